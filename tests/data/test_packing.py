"""Packed rows: every token of every document once an epoch, nothing from one document to the next, the same plan everywhere."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splits_in_memory import split_in_memory

from grist_data import Batches, Shards, packing, steps
from grist_data.batch import IGNORE
from grist_data.mixture import Mixture, Stage
from grist_data.packed_shards import PackedShards
from grist_data.packing import Bins, best_fit_decreasing, cached_bins, pack

T = 8


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Positions are computed 64 at a time: 4096 would be a thousand epochs of a handful of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_POSITIONS_AT_ONCE", 64)
        yield


documents_of_shards = st.lists(st.lists(st.integers(1, 25), min_size=1, max_size=12), min_size=1, max_size=3)


def split_of(shards: list[list[int]], name: str = "id-p", first_id: int = 1) -> Shards:
    """Documents of these lengths, shard by shard; the tokens are numbered from `first_id`, so that 0 is padding."""
    split = split_in_memory(name, [sum(lengths) for lengths in shards], first_id)
    for shard, lengths in zip(split.shards, shards, strict=True):
        shard.doc_ends = np.cumsum(lengths)
        vars(shard.header)["n_docs"] = len(lengths)
    return split


def document_of(shards: list[list[int]]) -> np.ndarray:
    """The document of each token, numbered from 0; by id, so with a first that is padding."""
    lengths = list(itertools.chain(*shards))
    return np.concatenate([[-1], np.repeat(np.arange(len(lengths)), lengths)])


def check_row(ids: list[int], targets: list[int], of: np.ndarray) -> None:
    """Inputs of whole pieces, then padding; a target is the next token of the same document, wherever that has one."""
    for i, (token, target) in enumerate(zip(ids, targets, strict=True)):
        goes_on = token and token + 1 < len(of) and of[token + 1] == of[token]
        following = ids[i + 1] if i + 1 < len(ids) else token + 1
        # A piece ends inside a row only where its document does.
        assert target == (token + 1 if goes_on else IGNORE)
        assert not goes_on or following == token + 1
        assert token or not any(ids[i:]), "padding is at the end"


@settings(max_examples=30, deadline=None)
@given(
    documents_of_shards,
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(1, 3),
    st.integers(1, 12),
    st.booleans(),
    st.data(),
)
def test_every_token_is_read_once_an_epoch(tmp_path_factory, shards, world_size, share, length, shuffle, data):
    tmp_path = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK_DOCUMENTS", data.draw(st.sampled_from([3, 65_536])))
        feeds = [
            Batches(
                split_of(shards),
                length,
                share * world_size,
                seed=1,
                rank=rank,
                world_size=world_size,
                shuffle=shuffle,
                packing="best-fit",
                packing_cache=tmp_path,
            )
            for rank in range(world_size)
        ]
    n, of = feeds[0].samples_per_epoch, document_of(shards)
    rows: list[tuple[list[int], list[int]]] = []
    while len(rows) < 2 * n:
        for feed in feeds:
            (batch,) = next(feed)
            assert batch.n_valid_tokens == int((batch.targets_BT != IGNORE).sum())
            rows += zip(batch.ids_BT.tolist(), batch.targets_BT.tolist(), strict=True)
    assert feeds[0].state_dict()["pos"] == len(rows)
    starts = {int(np.flatnonzero(of == document)[0]) for document in range(of.max() + 1)}
    for epoch in (rows[:n], rows[n : 2 * n]):
        for ids, targets in epoch:
            check_row(ids, targets, of)
        tokens = sorted(token for ids, _ in epoch for token in ids if token)
        assert tokens == list(range(1, len(of)))
        trained = sorted(target for _, targets in epoch for target in targets if target != IGNORE)
        assert trained == [token for token in tokens if token not in starts], "all but the first of each document"
    empty = sum(token == 0 for ids, _ in rows[:n] for token in ids)
    assert feeds[0].padding_share == pytest.approx(empty / (n * length))


def test_borders_are_those_of_pieces_and_of_padding(tmp_path):
    shards = [[3, 4, 8, 20, 1], [5, 2]]
    of = document_of(shards)
    feed = Batches(split_of(shards), T, 3, seed=0, packing="best-fit", packing_cache=tmp_path)
    for _ in range(4):
        (batch,) = next(feed)
        flat = of[batch.ids_BT.flatten().numpy()]
        borders = [0, *(i for i in range(1, 3 * T) if i % T == 0 or flat[i] != flat[i - 1]), 3 * T]
        assert batch.cu_seqlens is not None
        assert batch.cu_seqlens.tolist() == borders
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.max_seqlen == max(np.diff(borders))


def naive_best_fit(lengths: list[int], capacity: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return len(rooms)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 70), st.data())
def test_best_fit_is_that_of_the_definition(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    bins, n_bins = best_fit_decreasing(np.array(lengths, np.int64), capacity)
    assert sorted(set(bins.tolist())) == list(range(n_bins))
    assert (np.bincount(bins, lengths, n_bins) <= capacity).all()
    assert n_bins == naive_best_fit(lengths, capacity)


def test_little_stays_empty():
    lengths = np.minimum(2048, np.random.default_rng(0).lognormal(6, 1.2, 20_000).astype(np.int64) + 1)
    _, n_bins = best_fit_decreasing(lengths, 2048)
    assert n_bins <= 1.001 * lengths.sum() / 2048 + 1


SHARDS = [np.random.default_rng(seed).integers(1, 30, 200).tolist() for seed in range(2)]


def feed_of(tmp_path: Path, **options) -> Batches:
    arguments: dict[str, Any] = {"seed": 1, "packing": "best-fit", "packing_cache": tmp_path} | options
    return Batches(split_of(SHARDS), T, 6, **arguments)


def bins_of(feed: Batches) -> Bins:
    assert isinstance(feed.order.rows, PackedShards)
    return feed.order.rows.bins


def rows_of(feed: Batches, n_steps: int) -> list[list[int]]:
    return [row for _ in range(n_steps) for batch in next(feed) for row in batch.ids_BT.tolist()]


def test_epochs_have_the_same_rows_in_another_order(tmp_path):
    feed = feed_of(tmp_path)
    n = feed.samples_per_epoch
    rows = rows_of(feed, 2 * n // 6 + 1)
    first, second = rows[:n], rows[n : 2 * n]
    assert sorted(first) == sorted(second)
    assert first != second
    other = feed_of(tmp_path, seed=2)
    assert sorted(rows_of(other, n // 6)) != sorted(first[: n // 6 * 6]), (
        "other documents are together under another seed"
    )


def test_resuming(tmp_path):
    feed = feed_of(tmp_path, prefetch=2)
    rows_of(feed, 7)
    state, following = feed.state_dict(), rows_of(feed, 3)
    feed.close()
    resumed = feed_of(tmp_path)
    resumed.load_state_dict(state)
    assert rows_of(resumed, 3) == following
    with pytest.raises(ValueError, match=r"in another order: .* packing"):
        Batches(split_of(SHARDS), T, 6, seed=1).load_state_dict(state)


def test_the_plan_is_kept_and_is_the_same_everywhere(tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    for directory in (one, other):
        feed_of(directory)
    (file,) = one.glob("*.plan")
    assert file.read_bytes() == (other / file.name).read_bytes()
    assert not list(one.glob("*.part"))
    monkeypatch.setattr(packing, "pack", None)  # read, not made
    assert len(bins_of(feed_of(one))) > 0
    monkeypatch.undo()
    for options in ({"seed": 2}, {"shuffle": False}):
        feed_of(one, **options)
    cached_bins(split_of(SHARDS), T + 1, 1, True, one)
    cached_bins(split_of(SHARDS, "id-q"), T, 1, True, one)
    assert len(list(one.glob("*.plan"))) == 5, "each of what it depends on names another file"


def test_the_plan_is_pinned():
    """A run must go on in the same rows after an upgrade."""
    bins = pack(split_of([[3, 4, 8, 20, 1], [5, 2]]), T, 1, True)
    assert bins.starts.tolist() == [7, 15, 23, 36, 0, 31, 3, 41, 35]
    assert bins.lengths.tolist() == [8, 8, 8, 5, 3, 4, 4, 2, 1]
    assert bins.firsts.tolist() == [0, 1, 2, 3, 5, 7, 9]


def test_the_default_place_of_plans_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Batches(split_of(SHARDS), T, 6, seed=1, packing="best-fit")
    assert len(list((tmp_path / "gristmill" / "packing").glob("best-fit-*.plan"))) == 1


def test_a_damaged_plan_is_not_read(tmp_path):
    feed_of(tmp_path)
    (file,) = tmp_path.glob("*.plan")
    whole = file.read_bytes()
    for at in (3, 8, 16, 24, 32, 160, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=rf"{file.name} is not a whole packing plan: delete it"):
            feed_of(tmp_path)
    for keep in (0, 5, 24, 32, 40, 160, len(whole) - 8, len(whole) - 1):
        file.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="is not a whole packing plan"):
            feed_of(tmp_path)
    file.unlink()
    feed_of(tmp_path)
    assert file.read_bytes() == whole


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot keep the packing plan in .*file/plans: .*; name another packing_cache"):
        feed_of(tmp_path / "file" / "plans")


def test_a_mixture_of_packed_sources(tmp_path):
    other = split_of([[5, 6, 30, 2]], "id-o", first_id=100_000)
    mixture = Mixture({"p": split_of(SHARDS), "o": other}, {"p": 2, "o": 1}, (Stage(90, {"p": 1, "o": 2}, None, 3),))
    feed = Batches(mixture, T, 6, seed=1, packing="best-fit", packing_cache=tmp_path)
    rows = rows_of(feed, 50)
    of_other = [row for row in rows if row[0] >= 100_000]
    of_first = [row for row in rows if row[0] < 100_000]
    n = feed.order.windows()["o"]
    for begin in range(0, len(of_other) - n, n):
        tokens = sorted(token for row in of_other[begin : begin + n] for token in row if token)
        assert tokens == list(range(100_000, 100_043))
    assert len(of_first) == len({tuple(row) for row in of_first})
    assert sum(row[0] >= 100_000 for row in rows[:90]) == 30
    assert 0 < feed.padding_share < 0.1
    assert Batches(mixture, T, 6, seed=1).padding_share == 0


def test_reading_ahead_asks_for_pieces(tmp_path, monkeypatch):
    plain, split, asked = feed_of(tmp_path), split_of(SHARDS), []
    split.reads_whole = False
    ahead = Batches(split, T, 6, seed=1, packing="best-fit", packing_cache=tmp_path)
    monkeypatch.setattr(Shards, "will_need", lambda self, offsets, n: asked.append((*offsets.tolist(), n)))
    assert rows_of(plain, 3) == rows_of(ahead, 3)
    bins = ahead.order.offsets(np.arange(6 * (3 + 16))).tolist()
    pieces = [zip(*bins_of(ahead).pieces(number), strict=True) for number in bins]
    assert asked == [(start, length) for of_bin in pieces for start, length in of_bin]


def test_what_packing_cannot_do_is_refused(tmp_path):
    bad: list[tuple[dict[str, Any], str]] = [
        ({"stride": 4}, "stride and jitter are for windows"),
        ({"jitter": True}, "stride and jitter are for windows"),
        ({"packing": "first-fit"}, "packing must be one of none, best-fit, but is 'first-fit'"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            feed_of(tmp_path, **options)
    changed: list[dict[str, Any]] = [{"stages": (Stage(12, sequence_length=4),)}, {"unit_tokens": 2 * T}]
    for changes in changed:
        mixture = Mixture({"p": split_of(SHARDS)}, {"p": 1}, **changes)
        with pytest.raises(ValueError, match=r"packed rows have one length, but sequence_length or unit_tokens are \["):
            Batches(mixture, T, 6, seed=1, packing="best-fit", packing_cache=tmp_path)
    with pytest.raises(ValueError, match="packed for rows of 8 tokens, but asked for 9"):
        PackedShards(split_of(SHARDS), T, 1, True, tmp_path).windows(9)


def test_pickled_it_is_packed_again(dataset, tmp_path):
    packed = PackedShards(Shards.open(dataset), T, 1, True, tmp_path)
    again = pickle.loads(pickle.dumps(packed))
    assert type(again) is PackedShards
    rows = [np.zeros((3, T + 1), np.int64) for _ in range(2)]
    for shards, out in zip((packed, again), rows, strict=True):
        shards.gather(np.arange(3), out)
    assert rows[0].any()
    assert np.array_equal(rows[0], rows[1])
