"""Batches: the same samples for any number of ranks and any micro-batch, each once an epoch, and exact resumption."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grist_data import Batches, Shards, evaluation_batches, side_stream
from grist_data.batches import IGNORE

T = 16


@pytest.fixture(scope="module")
def shards(dataset) -> Shards:
    return Shards.open(dataset)


@pytest.fixture(scope="module")
def held_out(dataset) -> Shards:
    return Shards.open(dataset, "val")


def step_of(feeds: list[Batches]) -> torch.Tensor:
    """One global batch, the ranks' micro-batches in order: (G, T + 1)."""
    rows = []
    for feed in feeds:
        for batch in next(feed):
            assert batch.ids_BT.shape == (feed.micro_batch_size, T)
            assert batch.ids_BT.dtype == batch.targets_BT.dtype == torch.int64
            assert batch.n_valid_tokens == batch.targets_BT.numel()
            rows.append(torch.cat([batch.ids_BT, batch.targets_BT[:, -1:]], 1))
    return torch.cat(rows)


def make(shards, world_size=1, micro=None, G=8, **changes) -> list[Batches]:
    options: dict[str, Any] = {"seed": 3} | changes
    return [
        Batches(shards, T, G, rank=rank, world_size=world_size, micro_batch_size=micro, **options)
        for rank in range(world_size)
    ]


def test_targets_are_the_next_tokens(shards):
    stream = shards.read(0, shards.n_tokens).tolist()
    feed = Batches(shards, T, 4, seed=0, shuffle=False)
    (batch,) = next(feed)
    assert batch.ids_BT.flatten().tolist() == stream[: 4 * T]
    assert batch.targets_BT.flatten().tolist() == stream[1 : 4 * T + 1]
    assert batch.ids_BT.is_contiguous()
    assert batch.targets_BT.is_contiguous()


@pytest.mark.parametrize(
    ("world_size", "micro"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, None), (4, 1), (4, 2), (8, 1)]
)
def test_a_step_is_the_same_on_any_ranks_and_micro_batches(shards, world_size, micro):
    alone, together = make(shards), make(shards, world_size, micro)
    for _ in range(40):
        assert step_of(alone).equal(step_of(together))


@pytest.mark.parametrize("G", [1, 3, 8, 64])
def test_the_order_does_not_depend_on_the_batch_size(shards, G):
    first = torch.cat([step_of(make_) for make_ in [make(shards, G=192)]])
    feed = make(shards, G=G)
    assert torch.cat([step_of(feed) for _ in range(192 // G)]).equal(first)


def test_each_epoch_has_each_sample_once(shards, monkeypatch):
    read: list[int] = []
    monkeypatch.setattr(Shards, "gather", lambda self, offsets, out: read.extend(offsets.tolist()))
    feed = Batches(shards, T, 8, seed=0)
    n = feed.samples_per_epoch
    while len(read) < 3 * n:
        next(feed)
    assert n % 8, "the epoch edge should fall inside a batch"
    for epoch in range(3):
        assert len(set(read[epoch * n : (epoch + 1) * n])) == n
    assert read[:n] != read[n : 2 * n]
    assert feed.epoch == len(read) / n


def test_a_smaller_stride_gives_overlapping_samples(shards):
    assert (
        Batches(shards, T, 1, seed=0, stride=T // 4).samples_per_epoch
        > 3.5 * Batches(shards, T, 1, seed=0).samples_per_epoch
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 60), st.sampled_from([(1, 1), (1, 8), (2, 4), (4, 1)]), st.sampled_from([8, 24]))
def test_resuming_gives_the_batches_that_were_not_trained(shards, steps, topology, G):
    """On other ranks, with another micro-batch and another batch size."""
    whole = make(shards)
    for _ in range(steps):
        step_of(whole)
    state = whole[0].state_dict()
    assert state["pos"] == 8 * steps
    world_size, micro = topology
    resumed = make(shards, world_size, micro, G=G)
    for feed in resumed:
        feed.load_state_dict(state)
        assert feed.state_dict() == state
    expected = torch.cat([step_of(whole) for _ in range(3 * G // 8)])
    assert torch.cat([step_of(resumed) for _ in range(3)]).equal(expected)


def test_resuming_in_a_used_feed(shards):
    feed = make(shards)
    state = feed[0].state_dict()
    first = [step_of(feed) for _ in range(5)]
    feed[0].load_state_dict(state)
    assert all(step_of(feed).equal(before) for before in first)


def test_reading_ahead_changes_nothing(shards, monkeypatch):
    """As with a dataset too large to be read whole: windows are asked for 16 steps early, and the state does not run ahead."""
    plain = make(shards)
    asked: list[np.ndarray] = []
    monkeypatch.setattr(shards, "reads_whole", False)
    monkeypatch.setattr(shards, "will_need", lambda offsets, n: asked.append(offsets))
    ahead = make(shards)
    for step in range(1, 30):
        assert step_of(plain).equal(step_of(ahead))
        assert ahead[0].state_dict() == plain[0].state_dict()
        assert len(asked) == step + 16


def test_advice_to_the_system_is_accepted(shards, monkeypatch):
    monkeypatch.setattr(shards, "reads_whole", False)
    feed, plain = make(shards), make(shards)
    assert step_of(feed).equal(step_of(plain))
    shards.expect("sequential")


def test_an_error_leaves_the_state_where_it_was(shards, monkeypatch):
    plain, feed = make(shards), make(shards)
    assert step_of(plain).equal(step_of(feed))
    state = feed[0].state_dict()

    def failing(self, offsets, out):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "gather", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            next(feed[0])
    assert feed[0].state_dict() == state
    assert step_of(plain).equal(step_of(feed))


def test_ids_and_targets_are_written_independently(shards):
    feed = Batches(shards, T, 8, seed=0, micro_batch_size=4)
    batches = next(feed)
    ids = [batch.ids_BT.clone() for batch in batches]
    weight = torch.ones((), requires_grad=True)
    loss = torch.stack([((weight * batch.ids_BT) ** 2).sum() for batch in batches]).sum()
    for batch in batches:
        batch.targets_BT.fill_(IGNORE)
    assert all(batch.ids_BT.equal(before) for batch, before in zip(batches, ids, strict=True))
    loss.backward()  # the ids that were saved for it count as unchanged
    next(feed)
    assert all(batch.ids_BT.equal(before) for batch, before in zip(batches, ids, strict=True)), (
        "nor are they used again"
    )


def test_a_batch_moves_as_a_whole(shards, monkeypatch):
    (batch,) = next(Batches(shards, T, 8, seed=0, documents=True))
    moved = batch.to("meta")
    assert [tensor.device.type for tensor in moved.tensors()] == ["meta"] * 3
    assert (moved.n_valid_tokens, moved.max_seqlen) == (batch.n_valid_tokens, batch.max_seqlen)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)  # there is nothing to pin for here
    pinned = batch.pin_memory()
    assert all(a.equal(b + 1) for a, b in zip(pinned.tensors(), batch.tensors(), strict=True))
    assert len(next(Batches(shards, T, 8, seed=0))[0].to("meta").tensors()) == 2


def test_seeds_differ_and_repeat(shards):
    assert step_of(make(shards, seed=1)).equal(step_of(make(shards, seed=1)))
    assert not step_of(make(shards, seed=1)).equal(step_of(make(shards, seed=2)))


def test_states_of_other_data_or_plans_are_refused(shards, held_out):
    feed = make(shards)[0]
    state = feed.state_dict()
    with pytest.raises(
        ValueError, match=r"the run was reading dataset other, but .* resume with the dataset it began with"
    ):
        feed.load_state_dict(state | {"dataset_id": "other"})
    for changes in ({"seed": 4}, {"shuffle": False}, {"stride": 8}):
        with pytest.raises(ValueError, match="another order: seed, sequence_length, stride or shuffle differ"):
            make(shards, **changes)[0].load_state_dict(state)
    with pytest.raises(ValueError, match="another order"):
        Batches(shards, T + 1, 8, seed=3).load_state_dict(state)
    for broken in ({}, state | {"pos": -1}, state | {"pos": "3"}, state | {"more": 1}):
        with pytest.raises(ValueError, match="not a data position"):
            feed.load_state_dict(broken)


def test_sizes_that_do_not_divide_are_refused(shards):
    with pytest.raises(ValueError, match=r"global_batch_size \(8\) must be a positive multiple of world_size \(3\)"):
        make(shards, 3)
    with pytest.raises(ValueError, match=r"the rank's share of the batch \(4\) must be .* micro_batch_size \(3\)"):
        make(shards, 2, 3)
    with pytest.raises(ValueError, match="global_batch_size"):
        make(shards, G=0)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 2\)"):
        Batches(shards, T, 8, seed=0, rank=2, world_size=2)


def test_corpus_shorter_than_the_context(held_out):
    n = held_out.n_tokens
    with pytest.raises(
        ValueError, match=rf"shorter than one sample: it has {n:,} tokens, and sequence_length {n} needs {n + 1:,}"
    ):
        Batches(held_out, n, 1, seed=0)


def test_document_borders(shards):
    """Against the documents of every token, one by one."""
    document_of = []
    for shard in shards.shards:
        lengths = np.diff(shard.doc_ends, prepend=0)
        document_of += [(shard.path.name, k) for k, length in enumerate(lengths) for _ in range(length)]
    stream = shards.read(0, shards.n_tokens)
    feed = Batches(shards, 200, 4, seed=0, shuffle=False, documents=True, ignore_next_document=True, micro_batch_size=2)
    begin = 0
    for _ in range(3):
        for batch in next(feed):
            borders, ignored = [0], []
            for token in range(begin, begin + 400):
                new_row, new_document = (token - begin) % 200 == 0, document_of[token] != document_of[max(token - 1, 0)]
                if token > begin and (new_row or new_document):
                    borders.append(token - begin)
                ignored.append(document_of[token] != document_of[token + 1])
            assert batch.cu_seqlens is not None
            assert batch.cu_seqlens.dtype == torch.int32
            assert batch.cu_seqlens.tolist() == [*borders, 400]
            assert batch.max_seqlen == max(np.diff([*borders, 400]))
            expected = np.where(ignored, IGNORE, stream[begin + 1 : begin + 401].astype(np.int64))
            assert batch.targets_BT.flatten().tolist() == expected.tolist()
            assert batch.n_valid_tokens == 400 - sum(ignored)
            begin += 400
    assert any(ignored)


# Evaluation.


def predicted(shards, *args, **options) -> tuple[dict[int, int], int]:
    """token index -> how often it was a scored target, checked against the stream; and the number of batches."""
    stream = shards.read(0, shards.n_tokens).astype(np.int64)
    positions: dict[int, int] = {}
    count = 0
    for batch in evaluation_batches(shards, *args, **options):
        count += 1
        assert batch.ids_BT.dtype == batch.targets_BT.dtype == torch.int64
        assert batch.n_valid_tokens == int((batch.targets_BT != IGNORE).sum())
        for ids, targets in zip(batch.ids_BT.numpy(), batch.targets_BT.numpy(), strict=True):
            scored = np.flatnonzero(targets != IGNORE)
            if len(scored):
                positions[_place(stream, ids, targets, scored)] = len(scored)
    return positions, count


def _place(stream, ids, targets, scored) -> int:
    """Where the first scored target stands in the stream, found by its whole context."""
    last = scored[-1]
    context = np.append(ids[: last + 1], targets[last])
    windows = np.lib.stride_tricks.sliding_window_view(stream, len(context))
    (begin,) = np.flatnonzero((windows == context).all(1))[:1]
    assert (stream[begin + scored + 1] == targets[scored]).all()
    return int(begin + scored[0] + 1)


@pytest.mark.parametrize("stride", [None, 1, 17, 63, 64])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 3), (3, 2)])
def test_every_token_is_predicted_exactly_once(held_out, stride, world_size, batch_size):
    spans: list[tuple[int, int]] = []
    counts = set()
    for rank in range(world_size):
        found, count = predicted(
            held_out, 64, batch_size, stride=stride, rank=rank, world_size=world_size, max_tokens=700
        )
        spans += found.items()
        counts.add(count)
    covered = [token for begin, n in sorted(spans) for token in range(begin, begin + n)]
    assert covered == list(range(1, 701))
    assert len(counts) == 1, "ranks must do the same number of batches"


def test_the_whole_split_is_scored(held_out):
    scored = sum(batch.n_valid_tokens for batch in evaluation_batches(held_out, 50, 4))
    assert scored == held_out.n_tokens - 1


def test_strided_windows_have_context(held_out):
    rows = [row for batch in evaluation_batches(held_out, 64, 2, stride=16, max_tokens=400) for row in batch.targets_BT]
    first_scored = [int((row != IGNORE).nonzero()[0]) for row in rows if (row != IGNORE).any()]
    assert first_scored[0] == 0
    assert first_scored[1:] == [48] * (len(first_scored) - 1)


def test_a_split_shorter_than_the_window_is_padded(held_out):
    (batch,) = evaluation_batches(held_out, held_out.n_tokens + 50, 1)
    assert batch.ids_BT.shape == (1, held_out.n_tokens + 50)
    assert batch.n_valid_tokens == held_out.n_tokens - 1


def test_evaluation_documents(held_out):
    for batch in evaluation_batches(held_out, 300, 2, documents=True):
        assert batch.cu_seqlens is not None
        borders = batch.cu_seqlens.tolist()
        assert borders[0] == 0
        assert borders[-1] == 600
        assert 300 in borders
        after_end = [b for b in borders[1:-1] if b != 300]
        flat = batch.ids_BT.flatten()
        assert all(int(flat[b - 1]) == held_out.eot_id for b in after_end)
        ends = (flat == held_out.eot_id).nonzero().flatten() + 1
        real = [int(e) for e in ends if batch.targets_BT.flatten()[e - 1] != IGNORE and int(e) not in (300, 600)]
        assert set(real) <= set(after_end)


def test_bad_evaluation_input_is_refused(held_out):
    bad: list[tuple[dict[str, Any], str]] = [
        ({"stride": 65}, "stride must lie in 1 to sequence_length"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"rank": 2, "world_size": 2}, "0 <= rank < world_size"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            evaluation_batches(held_out, 64, 2, **options)


@pytest.mark.gpu
def test_batches_on_the_gpu_equal_those_on_the_cpu(shards):
    on_gpu, on_cpu = (
        Batches(shards, T, 8, seed=0, device="cuda", micro_batch_size=4),
        Batches(shards, T, 8, seed=0, micro_batch_size=4),
    )
    for _ in range(3 * side_stream.RING):
        for theirs, ours in zip(next(on_gpu), next(on_cpu), strict=True):
            assert theirs.ids_BT.device.type == "cuda"
            assert theirs.ids_BT.cpu().equal(ours.ids_BT)
            assert theirs.targets_BT.cpu().equal(ours.targets_BT)
