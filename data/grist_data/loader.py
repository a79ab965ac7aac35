"""The order of `Batches` for programs that are built around torch's DataLoader.

    stream = TokenStream(shards, sequence_length=512, global_batch_size=16, seed=0)
    for batch in DataLoader(stream, batch_size=None): ...

    dataset = TokenDataset(shards, sequence_length=512, seed=0)
    for batch in DataLoader(dataset, batch_size=16): ...

Both work with any number of worker processes, forked or spawned, and then take more time: batches have to be sent.
Shapes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from grist_data.batch import Batch
from grist_data.batches import Batches
from grist_data.mixture import Mixture
from grist_data.shards import Shards

_BLOCK = 4096  # positions, whose offsets are computed at once (steps.py)


class TokenStream(IterableDataset):
    """Endless: the rank's share of one step after the other, each a `Batch` on the CPU; for a DataLoader with batch_size=None.

    Worker w of W makes every W-th step, so that a DataLoader, which asks them in turn, gives all steps in their order. The
    stream is read on from where it stands, in this process; copies of it in workers begin where it stood.
    Arguments as those of `Batches`, without micro-batches, device and prefetch.
    """

    def __init__(
        self,
        shards: Shards | Mixture,
        sequence_length: int,
        global_batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        **options: Any,
    ) -> None:
        _refuse(options, "micro_batch_size", "device", "prefetch")
        self._arguments: dict[str, Any] = {
            "shards": shards,
            "sequence_length": sequence_length,
            "global_batch_size": global_batch_size,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            **options,
        }
        self._batches = Batches(**self._arguments)
        self._worker: tuple[int, int] | None = None  # whose position this is, where it is of one worker alone

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker = (info.id, info.num_workers) if info else (0, 1)
        if self._worker not in (None, worker):
            raise ValueError(
                f"the state is that of worker {self._worker[0]} of {self._worker[1]}, but this is worker {worker[0]} of"
                f" {worker[1]}: resume with the same num_workers, or from TokenStream.state_after"
            )
        number, of = worker
        to_skip = number if self._worker is None else of - 1
        while True:
            self._batches.skip(to_skip)
            batches = next(self._batches)
            if len(batches) > 1:
                raise ValueError(f"a stream gives one batch a step, but a stage asks for {len(batches)} micro-batches")
            self._worker = worker if of > 1 else None
            to_skip = of - 1
            yield batches[0]

    def state_dict(self) -> dict[str, Any]:
        """Where this copy of the stream stands. Without workers it is the state of `Batches`, and fits there; in a worker it
        is that of this worker, as a loader wants it that keeps one state for each.
        """
        state = self._batches.state_dict()
        return state if self._worker is None else {**state, "worker": list(self._worker)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of this class or of `Batches`. Raises ValueError as `Batches.load_state_dict` does."""
        self._batches.load_state_dict({key: value for key, value in state.items() if key != "worker"})
        number, of = state.get("worker", (None, None))
        self._worker = None if number is None or of is None else (number, of)

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state so many batches after where this stream stands; for a loader with workers, whose copies run on alone, count
        what it has given.
        """
        ahead = Batches(**self._arguments)
        ahead.load_state_dict(self._batches.state_dict())
        ahead.skip(batches)
        return ahead.state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return {"arguments": self._arguments, "state": self.state_dict()}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.__init__(**pickled["arguments"])
        self.load_state_dict(pickled["state"])


class TokenDataset(Dataset):
    """Map-style: item i is sample i of the order, which is shuffled already: read it in sequence.

    An item has `ids` and `targets`, (T,) int64, the targets being the next tokens, -100 where none counts; with `documents` (or
    packing) also `documents`, (T,) int64, the number of each token's document in its row, padding counted as one.

    samples: the length; by default an epoch of all sources. Other arguments as those of `Batches`.
    Sequential indices cost least: a sampler that shuffles again makes a batch of 8 ten times as expensive.
    """

    def __init__(
        self,
        shards: Shards | Mixture,
        sequence_length: int,
        *,
        seed: int,
        samples: int | None = None,
        **options: Any,
    ) -> None:
        _refuse(options, "micro_batch_size", "device", "prefetch", "rank", "world_size")
        self._arguments: dict[str, Any] = {
            "shards": shards,
            "sequence_length": sequence_length,
            "seed": seed,
            **options,
        }
        self._batches = Batches(global_batch_size=1, **self._arguments)
        self._samples = self._batches.samples_per_epoch if samples is None else samples
        self._first = 0
        self._block: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """The samples of a batch, rows of one block.

        Raises IndexError, and ValueError where a stage makes rows differ in length.
        """
        positions = np.array(indices, np.int64)
        if not positions.size:
            return []
        if not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"samples are numbered from 0 to {len(self) - 1}, but got {indices}")
        positions += self._first
        batch = self._batches.at(positions, self._offsets(positions))
        columns = {"ids": batch.ids_BT, "targets": batch.targets_BT}
        if batch.cu_seqlens is not None:
            columns["documents"] = _document_numbers(batch.cu_seqlens, *batch.ids_BT.shape)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def state_after(self, samples: int) -> dict[str, Any]:
        """The state of `Batches` when so many items have been trained on."""
        return self._batches.state_at(self._first + samples)

    def resume(self, state: dict[str, Any]) -> None:
        """Let item 0 be the sample that follows `state`. Raises ValueError as `Batches.load_state_dict` does."""
        self._batches.load_state_dict(state)
        self._first = state["pos"]

    def _offsets(self, positions: np.ndarray) -> np.ndarray | None:
        """From a block that is kept, where they lie in one; None otherwise."""
        number, last = int(positions.min()) // _BLOCK, int(positions.max()) // _BLOCK
        if number != last:
            return None
        if self._block is None or self._block[0] != number:
            block = np.arange(number * _BLOCK, (number + 1) * _BLOCK)
            self._block = number, self._batches.order.offsets(block)
        return self._block[1][positions - number * _BLOCK]

    def __getstate__(self) -> dict[str, Any]:
        return {"arguments": self._arguments, "samples": self._samples, "first": self._first}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.__init__(samples=pickled["samples"], **pickled["arguments"])
        self._first = pickled["first"]


def _document_numbers(cu_seqlens: torch.Tensor, B: int, T: int) -> torch.Tensor:
    """(B, T) int64: 0 for the first document of each row, 1 for the next, ..."""
    lengths = cu_seqlens.diff()
    numbers_BT = torch.repeat_interleave(torch.arange(len(lengths)), lengths).view(B, T)
    return numbers_BT - numbers_BT[:, :1]


def _refuse(options: dict[str, Any], *names: str) -> None:
    if wrong := [name for name in names if name in options]:
        raise TypeError(
            f"{', '.join(wrong)}: an argument of Batches that has no meaning under a DataLoader; leave it out"
        )
