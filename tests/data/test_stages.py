"""Stages: whatever changes on the way, every window of every source comes once an epoch, and the past stays as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splits_in_memory import split_in_memory

from grist_data.mixture import Mixture, Stage, identity
from grist_data.order import Order, Plan, Windows
from grist_data.stages import StagedOrder

UNIT = 12
LENGTHS = (1, 2, 3, 4, 6, 12)
N = 700


def staged(mixture: Mixture, T: int = UNIT, seed: int = 0, stride: int | None = None, jitter=True, shuffle=True):
    settings_ = mixture.resolved(T, 1, None)
    unit = mixture.unit(settings_)
    return StagedOrder(mixture, settings_, Plan(seed, unit, stride or unit, jitter, shuffle))


@st.composite
def mixtures(draw: Any, min_stages: int = 0) -> Mixture:
    """Up to four sources of up to three shards, and up to four stages with other weights, sources and lengths."""
    n_sources = draw(st.integers(1, 4))
    sources = {}
    for k, name in enumerate("abcd"[:n_sources]):
        shard_tokens = [draw(st.integers(UNIT + 1, 150)), *draw(st.lists(st.integers(1, 90), max_size=2))]
        sources[name] = split_in_memory(draw(st.sampled_from("pqrs")) + name, shard_tokens, first_id=1000 * k)
    gaps = draw(st.lists(st.integers(1, 6) | st.integers(1, 160), min_size=min_stages, max_size=4))
    starts = np.cumsum(gaps, dtype=np.int64).tolist()  # short stages too, in which a source may not be drawn at all
    names = st.lists(st.sampled_from(sorted(sources)), min_size=1, unique=True)
    shares = [{name: draw(st.integers(1, 9)) for name in draw(names)} for _ in [0, *starts]]
    shares[-1] |= dict.fromkeys(sorted(set(sources).difference(*shares)), 1)
    stages = tuple(
        Stage(start, weights, draw(st.sampled_from(LENGTHS))) for start, weights in zip(starts, shares[1:], strict=True)
    )
    return Mixture(sources, shares[0], stages, unit_tokens=UNIT)


def lengths(mixture: Mixture, T: int, positions: np.ndarray) -> np.ndarray:
    resolved = mixture.resolved(T, 1, None)
    of = np.searchsorted([setting.start for setting in resolved], positions, side="right") - 1
    return np.array([setting.sequence_length for setting in resolved])[of]


@settings(max_examples=80, deadline=None)
@given(mixtures(), st.sampled_from(LENGTHS), st.integers(1, UNIT), st.booleans(), st.booleans())
def test_every_window_once_an_epoch_through_all_stages(mixture, T, stride, jitter, shuffle):
    """Counted target by target: each token of each window of each source, once in every epoch that is over."""
    order = staged(mixture, T, 5, stride, jitter, shuffle)
    positions = np.arange(N)
    samples = order.samples(positions)
    lengths_ = lengths(mixture, T, positions)
    for k, (name, n_windows) in enumerate(order.windows().items()):
        of = samples.source == k
        if not of.any():
            continue
        read = np.zeros((samples.epoch[of].max() + 1, n_windows, UNIT), np.int64)
        rows = (samples.epoch, samples.window, samples.token, samples.masked, lengths_)
        for epoch, window, token, masked, length in zip(*(column[of].tolist() for column in rows), strict=True):
            assert token % length == 0
            read[epoch, window, token + masked : token + length] += 1
        assert (read[:-1] == 1).all(), name
        assert read[-1].max() == 1, name
        assert (np.diff(samples.epoch[of]) >= 0).all(), "an epoch began before the one before it was over"
        assert order.epochs(N)[name] == read.sum() / (n_windows * UNIT)


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.sampled_from(LENGTHS), st.integers(1, UNIT))
def test_offsets_are_where_the_samples_are(mixture, T, stride):
    order = staged(mixture, T, 5, stride)
    positions = np.random.default_rng(0).integers(0, N, 60)
    offsets, samples = order.offsets(positions), order.samples(positions)
    for row, offset in enumerate(offsets.tolist()):
        split = mixture.sources[order.names[samples.source[row]]]
        single = Order(split.windows(UNIT, stride), order.plan, identity(split))
        epoch, window = int(samples.epoch[row]), samples.window[row : row + 1]
        begin = single.windows.offsets(window, single.phase(epoch))[0] + samples.token[row]
        read = np.zeros((1, 2), np.int64)
        order.rows.gather(np.array([offset]), read)
        assert read[0].tolist() == split.read(int(begin), 2).tolist()
    assert order.offsets(positions[:1]).tolist() == offsets[:1].tolist()


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.sampled_from(LENGTHS), st.booleans())
def test_the_inverse_finds_every_position(mixture, T, shuffle):
    order = staged(mixture, T, 3, shuffle=shuffle)
    positions = np.arange(N)
    samples = order.samples(positions)
    for position in range(0, N, 7):
        source, epoch, window, token, masked = (int(column[position]) for column in samples)
        assert order.positions(order.names[source], np.array([window]), epoch, token + masked).tolist() == [position]
    for k, (name, n_windows) in enumerate(order.windows().items()):  # a whole epoch at once
        found = order.positions(name, np.arange(n_windows), 0)
        known = found[(found >= 0) & (found < N)]
        begins = (samples.source == k) & (samples.epoch == 0) & (samples.token + samples.masked == 0)
        assert sorted(known.tolist()) == np.flatnonzero(begins).tolist()


def test_windows_of_a_source_that_is_dropped_are_never_read():
    sources = {name: split_in_memory(name, [200]) for name in "ab"}
    order = staged(Mixture(sources, {"a": 1, "b": 1}, (Stage(4, {"a": 1}),)))
    found = order.positions("b", np.arange(order.windows()["b"]), 0)
    assert sorted(set(found.tolist())) == [-1, 1, 3]
    assert (order.positions("b", np.array([0]), 1) == -1).all()
    assert (order.positions("a", np.arange(order.windows()["a"]), 5) >= 0).all()


def test_questions_without_an_answer_are_refused():
    order = staged(Mixture({"a": split_in_memory("a", [200])}, {"a": 1}))
    n = order.windows()["a"]
    with pytest.raises(ValueError, match="no source 'b' in the mixture; it has a"):
        order.positions("b", np.array([0]), 0)
    for window in (-1, n):
        with pytest.raises(ValueError, match=rf"windows of a/train are numbered from 0 to {n - 1}, but got {window}"):
            order.positions("a", np.array([window]), 0)
    for epoch, token in ((-1, 0), (0, UNIT), (0, -1)):
        with pytest.raises(ValueError, match=r"need epoch >= 0 and a token in \[0, 12\)"):
            order.positions("a", np.array([0]), epoch, token)


def without_stages(mixture: Mixture, kept: int) -> Mixture:
    """The mixture as it was before the later stages were added, and the sources that only they read."""
    stages = mixture.stages[:kept]
    used = set(mixture.weights).union(*(stage.weights or {} for stage in stages))
    sources = {name: split for name, split in mixture.sources.items() if name in used}
    return dataclasses.replace(mixture, sources=sources, stages=stages)


def tokens_at(order: StagedOrder, positions: np.ndarray) -> np.ndarray:
    """(positions, 2): the first two tokens of each row, which name source and place."""
    out = np.zeros((len(positions), 2), np.int64)
    order.rows.gather(order.offsets(positions), out)
    return out


@settings(max_examples=30, deadline=None)
@given(mixtures(min_stages=1), st.sampled_from(LENGTHS), st.data())
def test_later_stages_and_sources_leave_the_past_alone(mixture, T, data):
    kept = data.draw(st.integers(0, len(mixture.stages) - 1))
    before, after = staged(without_stages(mixture, kept), T), staged(mixture, T)
    start = mixture.stages[kept].start
    past, tokens_before, tokens_after = (
        np.arange(start),
        tokens_at(before, np.arange(N)),
        tokens_at(after, np.arange(N)),
    )
    assert (tokens_before[:start] == tokens_after[:start]).all()
    assert (before.samples(past).masked == after.samples(past).masked).all()
    for position in {0, 1, start - 1, start}:
        assert before.identity(position) == after.identity(position)
    if (tokens_before != tokens_after).any():
        assert before.identity(N) != after.identity(N)


def test_names_and_their_order_do_not_matter():
    a, b = split_in_memory("id-a", [300]), split_in_memory("id-b", [200], first_id=1000)
    one = staged(Mixture({"a": a, "b": b}, {"a": 2, "b": 1}))
    two = staged(Mixture({"x": b, "y": a}, {"x": 10, "y": 20}))
    positions = np.arange(200)
    assert (tokens_at(one, positions) == tokens_at(two, positions)).all()
    assert one.identity(9) == two.identity(9)


def test_a_change_of_the_batch_size_alone_is_no_change_of_the_order():
    sources = {name: split_in_memory(name, [400]) for name in "ab"}
    shares = {"a": 7, "b": 2}
    plain, staged_ = staged(Mixture(sources, shares)), staged(Mixture(sources, shares, (Stage(5, None, None, 8),)))
    assert (plain.offsets(np.arange(99)) == staged_.offsets(np.arange(99))).all()
    assert plain.identity(50) == staged_.identity(50)


def test_plans_differ_by_every_field():
    sources = {name: split_in_memory(name, [400]) for name in "ab"}
    base = Mixture(sources, {"a": 1, "b": 1}, (Stage(8, {"a": 2, "b": 1}),), unit_tokens=12)
    others = [
        dataclasses.replace(base, weights={"a": 2, "b": 1}),
        dataclasses.replace(base, weights={"a": 1}),
        dataclasses.replace(base, unit_tokens=24),
        dataclasses.replace(base, stages=(Stage(9, {"a": 2, "b": 1}),)),
        dataclasses.replace(base, stages=(Stage(8, {"a": 1, "b": 2}),)),
        dataclasses.replace(base, stages=(Stage(8, {"a": 2, "b": 1}, 6),)),
        dataclasses.replace(base, stages=()),
        dataclasses.replace(base, sources=sources | {"b": split_in_memory("other", [400])}),
    ]
    digests = [staged(mixture).identity(20)[1] for mixture in [base, *others]]
    digests += [
        each.identity(20)[1] for each in (staged(base, seed=1), staged(base, stride=3), staged(base, jitter=False))
    ]
    assert len(set(digests)) == len(digests)
    assert staged(base).identity(20)[0] == "a/train,b/train"


def test_one_source_is_read_as_it_was_before_there_were_mixtures():
    """Runs that began without a mixture go on with one."""
    shard_tokens = [120, 7, 65]
    split = split_in_memory("id", shard_tokens)
    for stride, jitter, shuffle in ((8, True, True), (3, True, True), (8, False, False)):
        plan = Plan(5, 8, stride, jitter, shuffle)
        single = Order(Windows(shard_tokens, 8, stride, jitter), plan, "id/train")
        mixture = Mixture({"name": split}, {"name": 0.3})
        order = staged(mixture, 8, 5, stride, jitter, shuffle)
        positions = np.arange(200)
        assert (order.offsets(positions) == single.offsets(positions)).all()
        assert order.identity(77) == ("id", plan.digest())


def test_order_and_plan_are_pinned():
    """A run must go on in the same order after an upgrade."""
    order = staged(Mixture({"name": split_in_memory("id", [120, 7, 65])}, {"name": 1}), 8, 5)
    n = order.windows()["name"]
    assert n == 21
    assert order.offsets(np.arange(n - 3, n + 5)).tolist() == [140, 53, 85, 100, 163, 68, 155, 36]
    assert order.identity(3)[1].startswith("a83fd03b5d7b6911")
    sources = {name: split_in_memory(name, [200]) for name in "ab"}
    mixture = staged(Mixture(sources, {"a": 0.75, "b": 0.25}, (Stage(6, {"a": 0.5, "b": 0.5}, 4),)), 12, 5)
    assert mixture.offsets(np.arange(12)).tolist() == [150, 66, 18, 378, 138, 102, 6, 330, 10, 334, 14, 338]
    assert mixture.identity(12)[1].startswith("8f7d4d41e11753d9")


def test_longer_sequences_begin_inside_a_window_that_was_read_in_part():
    """One row of twelve: four targets were trained at length 4, so they are masked, and eight are new."""
    order = staged(Mixture({"a": split_in_memory("a", [400])}, {"a": 1}, (Stage(4, sequence_length=12),)), 4)
    samples = order.samples(np.arange(6))
    assert samples.token.tolist() == [0, 4, 8, 0, 0, 0]
    assert samples.masked.tolist() == [0, 0, 0, 0, 4, 0]
    assert order.masked == {4: 4}
    assert samples.window[3] == samples.window[4] != samples.window[5]


def test_a_source_that_a_short_stage_does_not_reach_stays_where_it_was():
    """Length 12 finds b with four tokens of a window read, but ends before b is drawn; length 6 goes on from there."""
    sources = {name: split_in_memory(name, [400]) for name in "ab"}
    stages = (Stage(2, {"a": 9, "b": 1}, 12), Stage(4, {"a": 1, "b": 1}, 6))
    order = staged(Mixture(sources, {"a": 1, "b": 1}, stages), 4)
    samples = order.samples(np.arange(8))
    assert samples.source.tolist() == [0, 1, 0, 0, 0, 1, 0, 1]
    assert samples.token.tolist() == [0, 0, 0, 0, 0, 0, 6, 6]
    assert order.masked == {2: 4, 5: 4}
    assert samples.window[1] == samples.window[5] == samples.window[7]


def test_far_positions_are_computed_like_near_ones():
    """Nothing is walked through: a walk to position 2^40 would not end."""
    sources = {name: split_in_memory(name, [5000]) for name in "ab"}
    order = staged(Mixture(sources, {"a": 2, "b": 1}, (Stage(1 << 40, {"a": 1, "b": 1}),)))
    far = (1 << 41) + np.arange(5)
    samples = order.samples(far)
    for position, source, epoch, window, token in zip(
        far.tolist(), *(column.tolist() for column in samples[:4]), strict=True
    ):
        assert order.positions(order.names[source], np.array([window]), epoch, token).tolist() == [position]


def test_a_source_shorter_than_a_window_is_named():
    sources = {"a": split_in_memory("a", [400]), "b": split_in_memory("folder-b", [12, 12])}
    with pytest.raises(
        ValueError,
        match=r"train split of folder-b is shorter than one sample: it has 24 tokens, .* needs 13 in one shard",
    ):
        staged(Mixture(sources, {"a": 1, "b": 1}))
