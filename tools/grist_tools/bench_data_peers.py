"""Other ways to make the same batches from the same file, for the data benchmark. Shapes: B batch, T time.

Each reads the token section of the first shard as an array of numpy, as these programs read a file without a header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from grist_data import Shards
from grist_tools.bench_data_sets import tokens_in_file
from grist_tools.bench_data_supply import SEED, Sizes
from grist_tools.bench_data_turns import Contestant

_CHECKED_BATCHES = 5

# x and y, (B, T) int64, and the first token of each row.
Drawn = tuple[torch.Tensor, torch.Tensor, list[int]]


def peers(split: Shards, sizes: Sizes) -> dict[str, Contestant]:
    """Name -> contestant. Raises ValueError for ids that torch has no cheap way to widen."""
    if split.dtype.itemsize != 2:
        raise ValueError(
            f"the peers read uint16 files, but {split.directory} has {split.dtype.name}: leave out --peers"
        )
    return {
        "nanoGPT's way, memmap kept open": _contestant(_nanogpt(split, sizes), split, sizes),
        "torch DataLoader, blocks": _contestant(_data_loader(split, sizes), split, sizes),
    }


def copy_limit(sizes: Sizes) -> Contestant:
    """A copy of as many bytes as x and y have, into memory that is there: what no supply of int64 batches goes beyond."""
    source = torch.randint(0, 2**15, (2, sizes.batch, sizes.time), generator=torch.Generator().manual_seed(SEED))
    target = torch.empty_like(source)

    def problem() -> str | None:
        return None if torch.equal(target.copy_(source), source) else "the copy differs from its source"

    return Contestant(sizes.tokens, lambda: target.copy_(source), problem)


def _mapped(split: Shards) -> np.ndarray:
    header = split.shards[0].header
    begin = header.sections["tokens"][0]
    return np.memmap(split.shards[0].path, header.encoding.dtype, "r", begin, (header.n_tokens,))


def _contestant(draw: Callable[[], Drawn], split: Shards, sizes: Sizes) -> Contestant:
    def problem() -> str | None:
        for _ in range(_CHECKED_BATCHES):
            x, y, offsets = draw()
            expected = np.stack([tokens_in_file(split, offset, sizes.time + 1) for offset in offsets])
            if not (np.array_equal(x.numpy(), expected[:, :-1]) and np.array_equal(y.numpy(), expected[:, 1:])):
                return f"x or y is not what the file has at tokens {offsets}"
        return None

    return Contestant(sizes.tokens, draw, problem)


def _nanogpt(split: Shards, sizes: Sizes) -> Callable[[], Drawn]:
    """get_batch of nanoGPT's train.py: random places with replacement, a tensor for each row, stacked.

    nanoGPT opens the memmap again for every batch, against a leak; kept open, as here, it is twice as fast.
    """
    data, T = _mapped(split), sizes.time
    random = torch.Generator().manual_seed(SEED)

    def draw() -> Drawn:
        places = torch.randint(len(data) - T, (sizes.batch,), generator=random)
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in places])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in places])
        return x, y, places.tolist()

    return draw


class _Blocks(Dataset):
    """Windows of T + 1 tokens, T apart. `__getitems__` makes a batch at once, the fastest that a DataLoader can be fed.

    x and y are views of one block, which writes half as much as two tensors do.
    """

    def __init__(self, data: np.ndarray, T: int) -> None:
        self._data, self._T = data, T

    def __len__(self) -> int:
        return (len(self._data) - 1) // self._T

    def __getitems__(self, windows: list[int]) -> Drawn:
        T = self._T
        offsets = [T * window for window in windows]
        rows = np.empty((len(windows), T + 1), np.int64)
        for row, offset in zip(rows, offsets, strict=True):
            row[:] = self._data[offset : offset + T + 1]
        block = torch.from_numpy(rows)
        return block[:, :-1], block[:, 1:], offsets


def _data_loader(split: Shards, sizes: Sizes) -> Callable[[], Drawn]:
    """Shuffled without replacement, in this process: a worker process is slower, its batches have to be sent."""
    dataset = _Blocks(_mapped(split), sizes.time)
    random = RandomSampler(dataset, generator=torch.Generator().manual_seed(SEED))  # pyright: ignore[reportArgumentType]
    sampler = BatchSampler(random, sizes.batch, drop_last=True)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=0, collate_fn=_as_it_is)

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = endless()
    return lambda: next(batches)


def _as_it_is(block: Any) -> Any:
    return block
