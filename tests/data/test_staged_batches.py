"""Batches of mixtures and stages: the same on any ranks, each target once an epoch, and runs that go on with more data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splits_in_memory import split_in_memory

from grist_data import Batches, Shards, steps
from grist_data.batches import IGNORE
from grist_data.mixture import Mixture, Stage

T = 8
A, B, C = (
    split_in_memory("id-a", [1001, 333, 700], first_id=0),
    split_in_memory("id-b", [900], first_id=10_000),
    split_in_memory("id-c", [90, 90], first_id=20_000),
)


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Positions are computed 64 at a time instead of 4096, so that blocks end inside epochs, stages and steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_POSITIONS_AT_ONCE", 64)
        yield


def all_ranks(shards: Shards | Mixture, G: int, world_size: int = 1, micro: int | None = None) -> list[Batches]:
    return [
        Batches(shards, T, G, seed=3, rank=rank, world_size=world_size, micro_batch_size=micro)
        for rank in range(world_size)
    ]


def step_of(feeds: list[Batches]) -> torch.Tensor:
    """One global batch, the ranks' micro-batches in order: (G, T + 1); a target that does not count is -100."""
    rows = []
    for feed in feeds:
        for batch in next(feed):
            assert batch.n_valid_tokens == int((batch.targets_BT != IGNORE).sum())
            rows.append(torch.cat([batch.ids_BT, batch.targets_BT[:, -1:]], 1))
    return torch.cat(rows)


def first_tokens(order, positions: np.ndarray) -> list[int]:
    out = np.zeros((len(positions), 1), np.int64)
    order.rows.gather(order.offsets(positions), out)
    return out[:, 0].tolist()


phases = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=5
)


@settings(max_examples=20, deadline=None)
@given(phases, st.booleans())
def test_ranks_and_batch_size_may_change_at_any_step(phases, mixed):
    """Each phase: world size, rows of a rank, steps. Together they must read the order, so every window once an epoch."""
    shards = Mixture({"a": A, "b": B, "c": C}, {"a": 3, "b": 1, "c": 1}) if mixed else A
    state = Batches(shards, T, 1, seed=3).state_dict()
    read: list[int] = []
    for world_size, share, n_steps in phases:
        feeds = all_ranks(shards, share * world_size, world_size, 1)
        for feed in feeds:
            feed.load_state_dict(state)
        for _ in range(n_steps):
            read += step_of(feeds)[:, 0].tolist()
        state = feeds[0].state_dict()
        assert all(feed.state_dict() == state for feed in feeds)
    assert state["pos"] == len(read)
    assert read == first_tokens(feeds[0].order, np.arange(len(read)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_each_window_of_each_source_once_an_epoch(world_size):
    G = 5 * world_size
    feeds = all_ranks(Mixture({"a": A, "b": B, "c": C}, {"a": 3, "b": 1, "c": 1}), G, world_size)
    order = feeds[0].order
    read: list[int] = []
    while min(order.epochs(len(read)).values()) < 1.2:
        read += step_of(feeds)[:, 0].tolist()
    sources = np.array(read) // 10_000  # sources have ids of their own
    for k, (name, n) in enumerate(order.windows().items()):
        of_source = np.array(read)[sources == k]
        assert len(of_source) == round(order.epochs(len(read))[name] * n)
        for begin in range(0, len(of_source), n):
            epoch = of_source[begin : begin + n]
            assert len(set(epoch.tolist())) == len(epoch)


STAGES = (
    Stage(40, {"a": 1, "b": 4}, sequence_length=4),
    Stage(64, global_batch_size=24, micro_batch_size=3),
    Stage(64 + 5 * 24, {"a": 2, "b": 1}, sequence_length=16, global_batch_size=8, micro_batch_size=1),
)
STAGED = Mixture({"a": A, "b": B}, {"a": 1}, STAGES)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_stages_change_lengths_weights_and_batch_sizes(world_size):
    feeds = all_ranks(STAGED, 8, world_size)
    shapes, position = [], 0
    targets: list[int] = []
    while position < 220:
        now = feeds[0].sequence_length, feeds[0].global_batch_size, feeds[0].micro_batch_size
        for feed in feeds:
            for batch in next(feed):
                assert batch.ids_BT.shape == (now[2], now[0])
                valid = batch.targets_BT[batch.targets_BT != IGNORE]
                assert len(valid) == batch.n_valid_tokens
                targets += valid.tolist()
        position += now[1]
        assert feeds[0].state_dict()["pos"] == position
        if not shapes or shapes[-1] != now:
            shapes.append(now)
    share = 8 // world_size
    assert shapes == [(8, 8, share), (4, 8, share), (4, 24, 3), (16, 8, 1)]
    assert len(set(targets)) == len(targets), "within the first epochs no target may come twice"
    order = feeds[0].order
    lines = sum(order.epochs(position)[name] * n * 16 for name, n in order.windows().items())
    assert len(targets) == round(lines), "and none may be lost"
    assert max(order.epochs(position).values()) < 1
    assert order.masked, "longer sequences should have begun inside a window here"


def test_resuming_inside_any_stage():
    whole = all_ranks(STAGED, 8)
    steps = []
    while whole[0].state_dict()["pos"] < 220:
        steps.append((whole[0].state_dict(), step_of(whole)))
    for state, expected in steps:
        resumed = all_ranks(STAGED, 8, 2)
        for feed in resumed:
            feed.load_state_dict(state)
        assert step_of(resumed).equal(expected)


def test_masked_targets_are_counted_once():
    """Targets trained before and last tokens of documents may be the same."""
    feed = Batches(STAGED, T, 8, seed=3, ignore_next_document=True, documents=True)
    seen = 0
    while feed.state_dict()["pos"] < 220:
        position = feed.state_dict()["pos"]
        for batch in next(feed):
            assert batch.n_valid_tokens == int((batch.targets_BT != IGNORE).sum())
            for row in batch.targets_BT:
                skipped = feed.order.masked.get(position, 0)
                assert (row[:skipped] == IGNORE).all()
                seen += skipped
                position += 1
    assert seen


def test_documents_of_a_mixture():
    """Every token's document, from the split that holds it."""
    feed = Batches(Mixture({"a": A, "b": B, "c": C}, {"a": 1, "b": 1, "c": 1}), 24, 6, seed=0, documents=True)
    document_of = {}
    for split in (A, B, C):
        for number, shard in enumerate(split.shards):
            lengths = np.diff(shard.doc_ends, prepend=0)
            documents = np.repeat(np.arange(len(lengths)), lengths)
            tokens = shard.tokens(0, shard.header.n_tokens).tolist()
            document_of |= {
                token: (split.dataset_id, number, k) for token, k in zip(tokens, documents.tolist(), strict=True)
            }
    for _ in range(20):
        (batch,) = next(feed)
        flat = [document_of[token] for token in batch.ids_BT.flatten().tolist()]
        borders = [0, *(i for i in range(1, len(flat)) if i % 24 == 0 or flat[i] != flat[i - 1]), len(flat)]
        assert batch.cu_seqlens is not None
        assert batch.cu_seqlens.tolist() == borders
        assert batch.max_seqlen == max(np.diff(borders))


def test_narrow_and_wide_tokens_in_one_mixture():
    wide = split_in_memory("wide", [500], first_id=100_000, dtype="<u4")
    narrow = split_in_memory("narrow", [500], first_id=40_000, dtype="<u2")
    feed = Batches(Mixture({"wide": wide, "narrow": narrow}, {"wide": 1, "narrow": 1}), T, 4, seed=0)
    rows = torch.cat([step_of([feed]) for _ in range(10)])
    assert (rows[:, 1:] == rows[:, :-1] + 1).all()
    assert {int(row[0]) // 40_000 for row in rows} == {1, 2}


def test_reading_ahead_asks_only_for_splits_that_are_not_read_whole(monkeypatch):
    mixture = Mixture({"a": A, "b": B}, {"a": 1, "b": 1}, (Stage(40, sequence_length=4),))
    plain = Batches(mixture, T, 4, seed=0)
    asked = []
    monkeypatch.setattr(A, "reads_whole", False)
    for split in (A, B):
        monkeypatch.setattr(split, "will_need", lambda offsets, n, split=split: asked.append((split, len(offsets), n)))
    ahead = Batches(mixture, T, 4, seed=0)
    for _ in range(20):
        assert step_of([plain]).equal(step_of([ahead]))
        assert ahead.state_dict() == plain.state_dict()
    assert {split for split, _, _ in asked} == {A}
    assert {n for _, _, n in asked} == {9, 5}
    assert sum(rows for _, rows, _ in asked) == 36 * 4 / 2


def test_a_run_on_one_dataset_goes_on_with_a_mixture():
    """And that with another stage: the state of each fits the next, and the past is the same."""
    alone = Batches(A, T, 4, seed=3)
    for _ in range(5):
        next(alone)
    state = alone.state_dict()
    assert state["dataset_id"] == "id-a"
    mixture = Mixture({"a": A, "b": B}, {"a": 1}, (Stage(20, {"a": 1, "b": 1}),))
    mixed = Batches(mixture, T, 4, seed=3)
    mixed.load_state_dict(state)
    assert mixed.state_dict() == state
    assert first_tokens(mixed.order, np.arange(20)) == first_tokens(alone.order, np.arange(20))
    next(mixed)
    later = mixed.state_dict()
    assert later["dataset_id"] == "id-a/train,id-b/train"
    three = Mixture({"a": A, "b": B, "c": C}, {"a": 1}, (*mixture.stages, Stage(24, {"b": 1, "c": 1})))
    extended = Batches(three, T, 4, seed=3)
    extended.load_state_dict(later)
    assert extended.state_dict() == later
    next(extended)
    with pytest.raises(
        ValueError, match="id-a/train,id-b/train,id-c/train, but here its first 28 samples come from id-a/t"
    ):
        mixed.load_state_dict(extended.state_dict())
    with pytest.raises(ValueError, match=r"the run was reading dataset id-a/train,id-b/train, but .* come from id-a:"):
        alone.load_state_dict(later)


def test_a_past_that_differs_is_refused():
    mixture = Mixture({"a": A, "b": B}, {"a": 1}, (Stage(20, {"a": 1, "b": 1}),))
    feed = Batches(mixture, T, 4, seed=3)
    for _ in range(6):
        next(feed)
    state = feed.state_dict()
    for stages in ((Stage(16, {"a": 1, "b": 1}),), (Stage(20, {"a": 2, "b": 1}),), (Stage(20, {"a": 1, "b": 1}, 4),)):
        other = Batches(Mixture(mixture.sources, mixture.weights, stages), T, 4, seed=3)
        with pytest.raises(
            ValueError, match=r"its first 24 samples in another order: .*weights and stages before that pos"
        ):
            other.load_state_dict(state)
    longer = Mixture(mixture.sources, mixture.weights, (*mixture.stages, Stage(40, sequence_length=2 * T)))
    with pytest.raises(ValueError, match=r"in another order: .* unit_tokens"):
        Batches(longer, T, 4, seed=3).load_state_dict(state)


def test_jitter_is_a_choice_of_its_own():
    fixed = Batches(A, T, 4, seed=3, jitter=False)
    tokens = first_tokens(fixed.order, np.arange(2 * fixed.samples_per_epoch))
    assert len(set(tokens)) == fixed.samples_per_epoch
    moved = Batches(A, T, 4, seed=3, shuffle=False, jitter=True)
    n = moved.samples_per_epoch
    first, second = (first_tokens(moved.order, np.arange(epoch * n, (epoch + 1) * n)) for epoch in range(2))
    assert (np.diff(first[:50]) == T).all()
    assert first != second
    with pytest.raises(ValueError, match="another order"):
        fixed.load_state_dict(Batches(A, T, 4, seed=3).state_dict())


def test_a_length_may_not_change_inside_a_step():
    mixture = Mixture({"a": A}, {"a": 1}, (Stage(20, sequence_length=4),))
    message = (
        r"changes to 4 at position 20, inside a step: steps of 8 samples from position 0 on have edges at 16 and 24"
    )
    with pytest.raises(ValueError, match=message):
        next(Batches(mixture, T, 8, seed=0))
    feed = Batches(mixture, T, 10, seed=0)
    state = feed.state_dict()
    with pytest.raises(ValueError, match="from position 5 on have edges at 15 and 25"):
        feed.load_state_dict(state | {"pos": 5})
    feed.load_state_dict(state | {"pos": 10})
    skipping = Mixture({"a": A}, {"a": 1}, (Stage(12, global_batch_size=4), Stage(14, sequence_length=4)))
    with pytest.raises(ValueError, match="changes to 4 at position 14, inside a step: steps of 8 samples"):
        next(Batches(skipping, T, 8, seed=0))
    resumed = Batches(mixture, T, 8, seed=0)
    resumed.load_state_dict(state | {"pos": 12})
    assert step_of([resumed]).shape == (8, T + 1)


def test_a_step_over_other_changes_keeps_its_size():
    feed = Batches(Mixture({"a": A, "b": B}, {"a": 1}, (Stage(12, {"b": 1}, None, 4),)), T, 8, seed=0)
    sizes = [len(step_of([feed])) for _ in range(4)]
    assert sizes == [8, 8, 4, 4]


def test_sizes_of_stages_must_divide():
    with pytest.raises(
        ValueError, match=r"global_batch_size from position 8 on \(6\) must be a positive multiple of world"
    ):
        Batches(Mixture({"a": A}, {"a": 1}, (Stage(8, global_batch_size=6),)), T, 8, seed=0, world_size=4)
    with pytest.raises(
        ValueError, match=r"the rank's share of the batch from position 8 on \(8\) must be .* micro_batch"
    ):
        Batches(Mixture({"a": A}, {"a": 1}, (Stage(8, micro_batch_size=3),)), T, 8, seed=0)
