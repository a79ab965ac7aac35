"""The DataLoader face: the same samples in the same order as `Batches`, for any workers, and states that fit both."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from splits_in_memory import split_in_memory
from torch.utils.data import DataLoader

from grist_data import Batches, Shards
from grist_data.batch import IGNORE, Batch
from grist_data.loader import TokenDataset, TokenStream
from grist_data.mixture import Mixture, Stage

T, G = 16, 6
WORKERS = [(0, None), (2, "fork"), (2, "spawn")]
A, B = split_in_memory("id-a", [1001, 333, 700]), split_in_memory("id-b", [900], first_id=10_000)


@pytest.fixture(scope="module")
def shards(dataset) -> Shards:
    return Shards.open(dataset)


def expected(shards, **options) -> Iterator[Batch]:
    for batches in Batches(shards, T, G, seed=3, **options):
        yield from batches


def loader(dataset, workers: int, context: str | None, **options: Any) -> DataLoader:
    return DataLoader(dataset, num_workers=workers, multiprocessing_context=context, **options)


def check_equal(batch: Batch, other: Batch) -> None:
    assert [tensor.tolist() for tensor in batch.tensors()] == [tensor.tolist() for tensor in other.tensors()]
    assert (batch.n_valid_tokens, batch.max_seqlen) == (other.n_valid_tokens, other.max_seqlen)


@pytest.mark.parametrize(("workers", "context"), WORKERS)
def test_a_stream_gives_the_batches_of_the_order(shards, workers, context):
    stream = TokenStream(shards, T, G, seed=3, documents=True)
    read = itertools.islice(loader(stream, workers, context, batch_size=None), 7)
    for batch, other in zip(read, expected(shards, documents=True), strict=False):
        check_equal(batch, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_a_step(shards, workers):
    streams = [TokenStream(shards, T, G, seed=3, rank=rank, world_size=2) for rank in range(2)]
    context = "fork" if workers else None
    read = zip(*(loader(stream, workers, context, batch_size=None) for stream in streams), strict=True)
    for together, other in zip(itertools.islice(read, 5), expected(shards), strict=False):
        assert torch.cat([batch.ids_BT for batch in together]).equal(other.ids_BT)


@pytest.mark.parametrize(("workers", "context"), WORKERS)
@pytest.mark.parametrize("sources", ["split", "mixture"])
def test_a_dataset_gives_the_rows_of_the_order(shards, dataset, workers, context, sources):
    source = (
        shards if sources == "split" else Mixture({"a": shards, "b": Shards.open(dataset, "val")}, {"a": 2, "b": 1})
    )
    tokens = TokenDataset(source, T, seed=3, samples=5 * G, ignore_next_document=True)
    read = list(loader(tokens, workers, context, batch_size=G))
    assert len(read) == 5
    for batch, other in zip(read, expected(source, ignore_next_document=True), strict=False):
        assert batch["ids"].equal(other.ids_BT)
        assert batch["targets"].equal(other.targets_BT)
        assert batch["ids"].dtype == batch["targets"].dtype == torch.int64


def test_a_dataset_is_an_epoch_long_and_knows_no_more():
    tokens = TokenDataset(A, T, seed=3)
    assert len(tokens) == Batches(A, T, G, seed=3).samples_per_epoch
    rows = [tuple(item["ids"].tolist()) for item in DataLoader(tokens, batch_size=None)]
    assert len(set(rows)) == len(rows) == len(tokens)
    for indices in ([-1], [0, len(tokens)]):
        with pytest.raises(IndexError, match=f"samples are numbered from 0 to {len(tokens) - 1}"):
            tokens.__getitems__(indices)
    assert tokens.__getitems__([]) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_goes_on_where_it_was(workers):
    whole, feed = TokenDataset(A, T, seed=3, samples=10_000), Batches(A, T, 10, seed=3)
    for _ in range(3):
        next(feed)
    assert whole.state_after(30) == feed.state_dict()
    resumed = TokenDataset(A, T, seed=3, samples=20)
    resumed.resume(feed.state_dict())
    context = "fork" if workers else None
    for batch, step in zip(loader(resumed, workers, context, batch_size=10), feed, strict=False):
        assert batch["ids"].equal(step[0].ids_BT)
    assert resumed.state_after(7)["pos"] == 37
    again = TokenDataset.__new__(TokenDataset)  # as pickle does, with shards that have no file
    again.__setstate__(resumed.__getstate__())
    assert again[0]["ids"].equal(whole[30]["ids"])
    with pytest.raises(ValueError, match="another order"):
        TokenDataset(A, T, seed=4).resume(feed.state_dict())


@pytest.mark.parametrize("indices", [[7], [5, 6, 7], [4095, 4096, 4097], [9000, 3, 4096, 3]])
def test_a_dataset_may_be_read_in_any_order(indices):
    tokens = TokenDataset(A, T, seed=3, samples=10_000)
    order = Batches(A, T, 1, seed=3).order
    rows = np.zeros((len(indices), T + 1), np.int64)
    order.rows.gather(order.offsets(np.array(indices)), rows)
    for item, row in zip(tokens.__getitems__(indices), rows.tolist(), strict=True):
        assert item["ids"].tolist() == row[:-1]
        assert item["targets"].tolist() == row[1:]


def test_documents_of_a_row_are_numbered():
    for item in TokenDataset(A, T, seed=3, documents=True).__getitems__(list(range(30))):
        # In these splits every document has seven tokens, which are numbered through the shard.
        ids, shard_begins = item["ids"].numpy(), np.array([0, 1001, 1334])
        document = (ids - shard_begins[np.searchsorted(shard_begins, ids, "right") - 1]) // 7
        assert item["documents"].tolist() == (document - document[0]).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_packed_rows(shards, tmp_path, workers):
    options = {"packing": "best-fit", "packing_cache": tmp_path}
    tokens, stream = TokenDataset(shards, T, seed=3, **options), TokenStream(shards, T, G, seed=3, **options)
    context = "fork" if workers else None
    both = zip(
        loader(tokens, workers, context, batch_size=G), loader(stream, workers, context, batch_size=None), strict=False
    )
    for (batch, streamed), other in zip(itertools.islice(both, 5), expected(shards, **options), strict=False):
        check_equal(streamed, other)
        assert batch["ids"].equal(other.ids_BT)
        assert batch["targets"].equal(other.targets_BT)
        assert other.cu_seqlens is not None
        begins = torch.zeros(G * T, dtype=torch.bool)
        begins[other.cu_seqlens[:-1]] = True
        numbers = begins.view(G, T).cumsum(1) - 1
        assert batch["documents"].equal(numbers)


def test_a_dataset_over_a_change_of_the_length():
    mixture = Mixture({"a": A}, {"a": 1}, (Stage(8, sequence_length=8),))
    tokens = TokenDataset(mixture, T, seed=3)
    assert [len(item["ids"]) for item in tokens.__getitems__([8, 9])] == [8, 8]
    with pytest.raises(ValueError, match="sequence_length changes between positions 7 and 8"):
        tokens.__getitems__([7, 8])


def test_masked_targets_of_a_stage_are_those_of_its_positions():
    mixture = Mixture({"a": A}, {"a": 1}, (Stage(5, sequence_length=8), Stage(8, sequence_length=T)))
    assert Batches(mixture, T, 1, seed=3).order.masked == {8: 8}  # three halves of a window: one and a half
    tokens = TokenDataset(mixture, T, seed=3, samples=20)
    masked = [int((item["targets"] == IGNORE).sum()) for item in tokens.__getitems__([9, 8, 10])]
    assert masked == [0, 8, 0]


def test_states_fit_batches_and_streams(shards):
    batches = Batches(shards, T, G, seed=3)
    stream = TokenStream(shards, T, G, seed=3)
    assert stream.state_dict() == batches.state_dict()
    reading = iter(stream)
    for _ in range(4):
        check_equal(next(reading), next(batches)[0])
        assert stream.state_dict() == batches.state_dict()
    resumed, other = TokenStream(shards, T, G, seed=3), Batches(shards, T, G, seed=3)
    resumed.load_state_dict(batches.state_dict())
    other.load_state_dict(stream.state_dict())
    following = next(batches)[0]
    check_equal(next(iter(resumed)), following)
    check_equal(next(other)[0], following)
    with pytest.raises(ValueError, match="another order"):
        TokenStream(shards, T, G, seed=4).load_state_dict(batches.state_dict())


@pytest.mark.parametrize("before", [2, 1, 0])
@pytest.mark.parametrize("after", [2, 3, 0])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_resuming_with_other_workers(shards, before, after):
    """The loader's owner counts what it got; a batch made ahead by a worker is none of it."""
    stream = TokenStream(shards, T, G, seed=3)
    feed = expected(shards)
    context = "fork" if before else None
    start = stream.state_dict()
    for batch in itertools.islice(loader(stream, before, context, batch_size=None), 5):
        check_equal(batch, next(feed))
    if before:
        assert stream.state_dict() == start, "workers have copies"
        state = stream.state_after(5)
    else:
        state = stream.state_dict()
    resumed = TokenStream(shards, T, G, seed=3)
    resumed.load_state_dict(state)
    context = "fork" if after else None
    for batch in itertools.islice(loader(resumed, after, context, batch_size=None), 5):
        check_equal(batch, next(feed))


class Worker:
    """What torchdata's StatefulDataLoader does in one worker: it keeps the state of each copy, and gives it back."""

    def __init__(self, stream: TokenStream, number: int, of: int, monkeypatch, state=None):
        self._info = type("Info", (), {"id": number, "num_workers": of})
        self._patch = monkeypatch
        self.stream = pickle.loads(pickle.dumps(stream))
        if state is not None:
            self.stream.load_state_dict(pickle.loads(pickle.dumps(state)))
        self._reading = iter(self.stream)

    def next(self) -> Batch:
        self._patch.setattr("grist_data.loader.get_worker_info", lambda: self._info)
        return next(self._reading)


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5])
def test_a_loader_that_keeps_a_state_for_each_worker(shards, monkeypatch, steps):
    stream, feed = TokenStream(shards, T, G, seed=3), expected(shards)
    workers = [Worker(stream, number, 3, monkeypatch) for number in range(3)]
    for step in range(steps):
        check_equal(workers[step % 3].next(), next(feed))
    states = [worker.stream.state_dict() for worker in workers]
    resumed = [Worker(stream, number, 3, monkeypatch, state) for number, state in enumerate(states)]
    for step in range(steps, steps + 7):  # begins with the worker whose turn it is
        check_equal(resumed[step % 3].next(), next(feed))


def test_the_state_of_one_worker_fits_no_other(shards, monkeypatch):
    stream = TokenStream(shards, T, G, seed=3)
    worker = Worker(stream, 1, 3, monkeypatch)
    worker.next()
    state = worker.stream.state_dict()
    for number, of in ((0, 3), (1, 2)):
        with pytest.raises(ValueError, match=rf"is that of worker 1 of 3, but this is worker {number} of {of}: resume"):
            Worker(stream, number, of, monkeypatch, state).next()
    with pytest.raises(ValueError, match="not a data position"):
        stream.load_state_dict({})


def test_arguments_without_a_meaning_here_are_refused(shards):
    with pytest.raises(TypeError, match="prefetch: an argument of Batches that has no meaning under a DataLoader"):
        TokenStream(shards, T, G, seed=3, prefetch=2)
    with pytest.raises(TypeError, match="rank, world_size: an argument"):
        TokenDataset(shards, T, seed=3, rank=0, world_size=2)
    micro = Mixture({"a": A}, {"a": 1}, (Stage(6, micro_batch_size=2),))
    reading = iter(TokenStream(micro, T, G, seed=3))
    next(reading)
    with pytest.raises(ValueError, match="one batch a step, but a stage asks for 3 micro-batches"):
        next(reading)


def test_pickled_shards_are_opened_again(dataset):
    shards = Shards.open(dataset, verify="lazy")
    again = pickle.loads(pickle.dumps(shards))
    assert again.dataset_id == shards.dataset_id
    assert again.shards[0]._map is not shards.shards[0]._map
    assert again.shards[0]._lazy
    assert not pickle.loads(pickle.dumps(Shards.open(dataset, verify="full"))).shards[0]._lazy
    pickled = pickle.dumps(shards)
    altered = pickled.replace(shards.dataset_id.encode(), b"0" * 64)
    with pytest.raises(ValueError, match=rf"was 0{{64}} when it was opened, but is {shards.dataset_id} now"):
        pickle.loads(altered)
