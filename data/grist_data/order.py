"""Which tokens sample number i of a source is made of: arithmetic on (seed, i), with nothing drawn and nothing stored.

Number i -> epoch and place in it -> a keyed permutation -> window. World size, batch size and accumulation do not occur.
How several sources take turns is in stages.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grist_data.atomic import canonical_json
from grist_data.permutation import Feistel, hash64

_PLAN_VERSION = 1


class Windows:
    """The samples of a source: windows of sequence_length + 1 tokens, `stride` apart, inside the shards.

    jitter: move all cuts by up to sequence_length - 1 tokens, differently in every epoch; the count stays the same.
    len(windows) is the number of samples. A shard of fewer than sequence_length + 1 tokens has none.
    """

    def __init__(self, shard_tokens: Sequence[int], sequence_length: int, stride: int, jitter: bool) -> None:
        if sequence_length < 1 or not 1 <= stride <= sequence_length:
            raise ValueError(
                f"need sequence_length >= 1 and 1 <= stride <= sequence_length, but got {sequence_length} and {stride}"
            )
        tokens = np.array(shard_tokens, np.int64)
        starts = np.concatenate([[0], np.cumsum(tokens)[:-1]])
        usable = tokens > sequence_length
        room = tokens[usable] - 1 - sequence_length
        slack = np.minimum(room, sequence_length - 1 if jitter else 0)
        self.stride = stride
        self._starts, self._slack = starts[usable], slack
        self._ends = np.cumsum(1 + (room - slack) // stride)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def offsets(self, ids: np.ndarray, phase: int) -> np.ndarray:
        """First token of each window, int64, numbered through the split. phase: the epoch's shift, in [0, 2^64)."""
        shard = np.searchsorted(self._ends, ids, side="right")
        index = ids - np.where(shard > 0, self._ends[shard - 1], 0)
        shift = (np.uint64(phase) % (self._slack + 1).astype(np.uint64)).astype(np.int64)
        return self._starts[shard] + shift[shard] + index * self.stride


@dataclass(frozen=True)
class Plan:
    """Everything that decides in which order a source is read. Two runs with equal plans read the same samples.

    seed: of the order. sequence_length, stride: tokens of a window, and between the beginnings of two. jitter: other cuts in
    every epoch. shuffle: False reads in file order. packing: `none`, or `best-fit` for bins of whole documents (packing.py).
    """

    seed: int
    sequence_length: int
    stride: int
    jitter: bool
    shuffle: bool
    packing: str = "none"

    def digest(self, stages: Sequence[Any] = ((0, "single"),)) -> str:
        """sha256 of the plan. stages: how sources take turns, as JSON."""
        plan: dict[str, Any] = {"version": _PLAN_VERSION, "stages": stages, **vars(self)}
        return hashlib.sha256(canonical_json(plan)).hexdigest()


class Order:
    """Number -> window of one source, for any number from 0: epochs follow each other without a gap.

    source: identity of the source; another source is shuffled differently under the same seed.
    """

    def __init__(self, windows: Windows, plan: Plan, source: str) -> None:
        self.windows, self.plan, self.source = windows, plan, source

    def offsets(self, numbers: np.ndarray, pieces: int = 1) -> np.ndarray:
        """First token of each sample, int64. Cheap in blocks of thousands.

        pieces: into how many samples each window is cut, a divisor of its length; they are read one after the other.
        """
        windows, piece = np.divmod(numbers, pieces)
        epochs, ids = self.ids(windows)
        out = piece * (self.plan.sequence_length // pieces)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            out[chosen] += self.windows.offsets(ids[chosen], self.phase(epoch))
        return out

    def ids(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The epoch of each number, and the window that is read, as `Windows.offsets` numbers them; int64."""
        epochs, places = np.divmod(numbers, len(self.windows))
        if self.plan.shuffle:
            for epoch in np.unique(epochs).tolist():
                chosen = epochs == epoch
                places[chosen] = self._permutation(epoch)(places[chosen])
        return epochs, places

    def numbers(self, ids: np.ndarray, epoch: int) -> np.ndarray:
        """The number at which each window is read in an epoch, int64: the inverse of `ids`.

        Raises ValueError for ids outside [0, len(windows)).
        """
        ids = np.asarray(ids, np.int64)
        size = len(self.windows)
        if ids.size and not 0 <= ids.min() <= ids.max() < size:
            raise ValueError(
                f"windows of {self.source} are numbered from 0 to {size - 1}, but got {ids.min()} to {ids.max()}"
            )
        return epoch * size + (self._permutation(epoch).inverse(ids) if self.plan.shuffle else ids)

    def phase(self, epoch: int) -> int:
        """By how much the cuts of an epoch are moved, before `Windows` takes it modulo the room in each shard."""
        return hash64("phase", self.plan.seed, self.source, epoch) if self.plan.jitter else 0

    def _permutation(self, epoch: int) -> Feistel:
        # The parts are hashed together: with seed + epoch, seed 1 would begin where seed 0 goes on.
        return Feistel(len(self.windows), (self.plan.seed, self.source, epoch))
