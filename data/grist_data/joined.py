"""Several splits read as one long row of tokens, one behind the other: what a mixture is for the code that copies rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from grist_data.shards import Shards


class Joined:
    """Splits with tokens numbered through all of them; a window lies inside one. Methods as those of `Shards`.

    starts: (splits,) int64, the number of each split's first token. dtype: the widest of theirs.
    """

    def __init__(self, splits: Sequence[Shards]) -> None:
        self.splits = tuple(splits)
        sizes = np.array([split.n_tokens for split in self.splits], np.int64)
        self.starts = np.cumsum(sizes) - sizes
        self.reads_whole = all(split.reads_whole for split in self.splits)
        self.has_loss_mask = any(split.has_loss_mask for split in self.splits)
        self.dtype = max((split.dtype for split in self.splits), key=lambda dtype: dtype.itemsize)

    def gather(self, offsets: np.ndarray, out: np.ndarray) -> None:
        """Copy len(out) windows of out.shape[1] tokens into the rows of `out`."""
        of = self._split_of(offsets)
        local = offsets - self.starts[of]
        for row, k in enumerate(of.tolist()):
            self.splits[k].gather(local[row : row + 1], out[row : row + 1])

    def untrained(self, offsets: np.ndarray, out: np.ndarray) -> None:
        """Which targets do not count for the loss masks: (rows, T) bool, written to `out`."""
        of = self._split_of(offsets)
        local = offsets - self.starts[of]
        for row, k in enumerate(of.tolist()):
            if self.splits[k].has_loss_mask:
                self.splits[k].untrained(local[row : row + 1], out[row : row + 1])
            else:
                out[row] = False

    def documents(self, offsets: np.ndarray, T: int, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Where documents end in rows, and targets that do not count; flat numbers, by split, not by row."""
        of = self._split_of(offsets)
        local = offsets - self.starts[of]
        found = []
        for k in sorted(set(of.tolist())):
            chosen = np.flatnonzero(of == k)
            found.append(self.splits[k].documents(local[chosen], T, [rows[row] for row in chosen.tolist()]))
        borders, last = zip(*found, strict=True)
        return np.concatenate(borders), np.concatenate(last)

    def will_need(self, offsets: np.ndarray, n: int) -> None:
        """Ask the system to read the windows at `offsets` soon, in the splits that are not read whole anyway."""
        of = self._split_of(offsets)
        for k in np.unique(of).tolist():
            if not self.splits[k].reads_whole:
                self.splits[k].will_need(offsets[of == k] - self.starts[k], n)

    def expect(self, pattern: Literal["random", "sequential"]) -> None:
        """Tell the system how the files will be read."""
        for split in self.splits:
            split.expect(pattern)

    def _split_of(self, offsets: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, offsets, side="right") - 1
