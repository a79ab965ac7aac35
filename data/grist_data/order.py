"""Which tokens sample number i of a run is made of: arithmetic on (seed, i), with nothing drawn and nothing stored.

Position i -> epoch and place in it -> a keyed permutation -> window. World size, batch size and accumulation do not occur.
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
        """First token of each window, int64, numbered through the split. phase: the epoch's shift, any integer >= 0."""
        shard = np.searchsorted(self._ends, ids, side="right")
        index = ids - np.where(shard > 0, self._ends[shard - 1], 0)
        shift = np.array([phase % (int(slack) + 1) for slack in self._slack], np.int64)
        return self._starts[shard] + shift[shard] + index * self.stride


@dataclass(frozen=True)
class Plan:
    """Everything that decides which window a position is. Two runs with equal plans read the same samples.

    seed: of the order. sequence_length, stride: tokens. shuffle: False reads in file order.
    """

    seed: int
    sequence_length: int
    stride: int
    jitter: bool
    shuffle: bool

    def digest(self) -> str:
        """sha256 of the plan; `stages` and `packing` are the places of a later mixture of sources and of packing."""
        plan: dict[str, Any] = {"version": _PLAN_VERSION, "stages": [[0, "single"]], "packing": "none", **vars(self)}
        return hashlib.sha256(canonical_json(plan)).hexdigest()


class Order:
    """Position -> window of one source, for any position: epochs follow each other without a gap.

    source: identity of the source; another source is shuffled differently under the same seed.
    """

    def __init__(self, windows: Windows, plan: Plan, source: str) -> None:
        self.windows, self.plan, self.source = windows, plan, source

    def offsets(self, positions: np.ndarray) -> np.ndarray:
        """First token of the window of each position, int64. Cheap in blocks of thousands."""
        epochs, places = np.divmod(positions, len(self.windows))
        out = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            out[chosen] = self.windows.offsets(self._shuffled(places[chosen], epoch), self._phase(epoch))
        return out

    def _shuffled(self, places: np.ndarray, epoch: int) -> np.ndarray:
        if not self.plan.shuffle:
            return places
        # The parts are hashed together: with seed + epoch, seed 1 would begin where seed 0 goes on.
        return Feistel(len(self.windows), (self.plan.seed, self.source, epoch))(places)

    def _phase(self, epoch: int) -> int:
        return hash64("phase", self.plan.seed, self.source, epoch) if self.plan.jitter else 0
