"""A split read bin by bin instead of window by window (packing.py)."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grist_data.mixture import Mixture, Setting
from grist_data.order import Windows
from grist_data.packing import Bins, cached_bins
from grist_data.shards import Shards


class PackedWindows(Windows):
    """The bins in the place of windows: `offsets` are numbers of bins, the same in every epoch."""

    def __init__(self, n_bins: int) -> None:
        self._n_bins = n_bins

    def __len__(self) -> int:
        return self._n_bins

    def offsets(self, ids: np.ndarray, phase: int) -> np.ndarray:
        return ids


class PackedShards(Shards):
    """A split whose rows are bins. What is called `offset` in `gather`, `documents` and `will_need` is the number of a bin.

    A row has T + 1 tokens, as elsewhere. Pieces of documents stand one behind the other, then comes padding. The last token is
    the target of the one before it where a document goes on in another bin; otherwise it does not count.
    """

    def __init__(
        self, shards: Shards, sequence_length: int, seed: int, shuffle: bool, cache: str | Path | None
    ) -> None:
        vars(self).update(vars(shards))  # the files are open, and stay shared
        self.unpacked, self.sequence_length = shards, sequence_length
        self._packing = sequence_length, seed, shuffle, cache
        self.bins: Bins = cached_bins(shards, *self._packing)
        self._filler = self.eot_id or 0

    def __reduce__(self):
        return type(self), (self.unpacked, *self._packing)

    @property
    def padding_share(self) -> float:
        """Of the places in all rows, those without a token."""
        return 1 - self.n_tokens / (len(self.bins) * self.sequence_length)

    def windows(self, sequence_length: int, stride: int | None = None, jitter: bool = True) -> Windows:
        """Raises ValueError for rows of another length than was packed for."""
        if sequence_length != self.sequence_length:
            raise ValueError(f"packed for rows of {self.sequence_length} tokens, but asked for {sequence_length}")
        return PackedWindows(len(self.bins))

    def gather(self, offsets: np.ndarray, out: np.ndarray) -> None:
        """Fill the rows of `out` with bins."""
        for row, number in zip(out, offsets.tolist(), strict=True):
            starts, lengths = self.bins.pieces(number)
            at = 0
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
                row[at : at + length] = self._inside(start, length)
                at += length
            row[at:] = self._filler
            if self._goes_on(starts, lengths):
                row[-1:] = self._inside(int(starts[0]) + self.sequence_length, 1)

    def untrained(self, offsets: np.ndarray, out: np.ndarray) -> None:
        """Which targets do not count for the loss mask: (rows, T) bool, written to `out`.

        Of padding and ends of documents `documents` tells.
        """
        out[:] = True
        for row, number in zip(out, offsets.tolist(), strict=True):
            starts, lengths = self.bins.pieces(number)
            at = 0
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
                row[at : at + length - 1] = ~self._trained_inside(start, length)[1:]
                at += length
            if self._goes_on(starts, lengths):
                row[-1:] = ~self._trained_inside(int(starts[0]) + self.sequence_length, 1)

    def documents(self, offsets: np.ndarray, T: int, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Where pieces end, and the targets that do not count: of a document's last token, and padding."""
        borders, ignored = [], []
        for row, number in zip(rows, offsets.tolist(), strict=True):
            starts, lengths = self.bins.pieces(number)
            ends = row * T + np.cumsum(lengths)
            borders.append(ends)
            if not self._goes_on(starts, lengths):
                ignored += [ends - 1, np.arange(int(ends[-1]), (row + 1) * T)]
        return np.concatenate(borders), np.concatenate(ignored or [np.zeros(0, np.int64)])

    def will_need(self, offsets: np.ndarray, n: int | None) -> None:
        """Ask the system to read the bins soon; a piece at a time."""
        for number in offsets.tolist():
            for start, length in zip(*self.bins.pieces(number), strict=True):
                self.unpacked.will_need(np.array([start]), int(length))

    def _inside(self, start: int, n: int) -> np.ndarray:
        """Tokens of one document, which lie in one shard."""
        k = bisect.bisect_right(self._starts, start) - 1
        begin = start - self._starts[k]
        return self.shards[k].tokens(begin, begin + n)

    def _trained_inside(self, start: int, n: int) -> np.ndarray:
        k = bisect.bisect_right(self._starts, start) - 1
        begin = start - self._starts[k]
        return self.shards[k].trained(begin, begin + n)

    def _goes_on(self, starts: np.ndarray, lengths: np.ndarray) -> bool:
        """Whether the document goes on in another bin. Only a piece that is a whole row can be one of several."""
        if int(lengths[0]) < self.sequence_length:
            return False
        end = int(starts[0]) + self.sequence_length
        k = bisect.bisect_left(self._starts, end) - 1
        ends = self.shards[k].doc_ends
        return int(ends[ends.searchsorted(end - self._starts[k])]) != end - self._starts[k]


def packed(
    mixture: Mixture, settings: Sequence[Setting], seed: int, shuffle: bool, cache: str | Path | None
) -> Mixture:
    """The mixture with every source packed. Raises ValueError where rows would have more than one length."""
    lengths = {setting.sequence_length for setting in settings} | {mixture.unit(settings)}
    if len(lengths) > 1:
        raise ValueError(
            f"packed rows have one length, but sequence_length or unit_tokens are {sorted(lengths)}: leave packing out, or"
            " begin a new run at the change"
        )
    (T,) = lengths
    sources = {name: PackedShards(split, T, seed, shuffle, cache) for name, split in mixture.sources.items()}
    return dataclasses.replace(mixture, sources=sources)
