"""Whole documents in rows of a fixed length: which documents share a row ("bin"), so that little of it stays empty.

Best fit decreasing: the longest document first, each into the bin in which it leaves the least room (Johnson 1973; at most 11/9
of the fewest bins there can be, plus one). Documents are taken in a shuffled order and packed in blocks, so that a row mixes
documents from everywhere and memory stays flat. Nothing is dropped: a document longer than a row fills rows of its own, and
what is left of it is packed like a document.

Which documents share a row is decided once, and is the same in every epoch and on every machine; the order of rows is not.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import xxhash

from grist_data.atomic import atomic_file, canonical_json
from grist_data.document_index import DocumentIndex
from grist_data.lock import exclusive
from grist_data.mixture import identity
from grist_data.permutation import Feistel
from grist_data.shards import Shards

BLOCK_DOCUMENTS = 65_536
_VERSION = 1
_MAGIC = int.from_bytes(b"gristbin", "little")


class Bins:
    """The pieces of documents in each bin.

    firsts: (bins + 1,) int64, the first piece of each bin. starts, lengths: (pieces,) int64, the tokens of each piece. A piece
    does not cross the end of a document.
    """

    def __init__(self, firsts: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        self.firsts, self.starts, self.lengths = firsts, starts, lengths

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def pieces(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """First token and length of the pieces of a bin."""
        first, last = self.firsts[number : number + 2].tolist()
        return self.starts[first:last], self.lengths[first:last]


def pack(split: Shards, sequence_length: int, seed: int, shuffle: bool) -> Bins:
    """Pack all documents of a split into rows of sequence_length tokens. Some 2 microseconds a document."""
    index = DocumentIndex(split)
    documents = Feistel(index.n_docs, ("packing", seed, identity(split)))
    firsts, starts, lengths, n_pieces = [np.zeros(1, np.int64)], [], [], 0
    for begin in range(0, index.n_docs, BLOCK_DOCUMENTS):
        numbers = np.arange(begin, min(index.n_docs, begin + BLOCK_DOCUMENTS))
        block = pack_block(*index.spans(documents(numbers) if shuffle else numbers), sequence_length)
        firsts.append(block.firsts[1:] + n_pieces)
        starts.append(block.starts)
        lengths.append(block.lengths)
        n_pieces += len(block.starts)
    return Bins(np.concatenate(firsts), np.concatenate(starts), np.concatenate(lengths))


def pack_block(begins: np.ndarray, ends: np.ndarray, capacity: int) -> Bins:
    """Pack the documents [begins, ends): full rows of the long ones first, then the rest by best fit decreasing."""
    full, rest = np.divmod(ends - begins, capacity)
    n_full = int(full.sum())
    of = np.repeat(np.arange(len(full)), full)
    place = np.arange(n_full) - np.repeat(np.cumsum(full) - full, full)
    shorter = np.flatnonzero(rest)
    bins, n_bins = best_fit_decreasing(rest[shorter], capacity)
    bins = np.concatenate([np.arange(n_full), n_full + bins])
    by_bin = np.argsort(bins, kind="stable")
    starts = np.concatenate([begins[of] + place * capacity, (ends - rest)[shorter]])[by_bin]
    lengths = np.concatenate([np.full(n_full, capacity), rest[shorter]])[by_bin]
    counts = np.bincount(bins, minlength=n_full + n_bins)
    return Bins(np.concatenate([[0], np.cumsum(counts)]), starts, lengths)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The bin of each length, int64, and the number of bins. lengths: 1 to capacity."""
    by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit r is set where a bin has room for exactly r more: finding the best fit is a shift
    order = np.argsort(-lengths, kind="stable")
    bins, n_bins = [], 0
    for length in lengths[order].tolist():
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, number = capacity, n_bins
            n_bins += 1
        bins.append(number)
        if room > length:
            by_room[room - length].append(number)
            rooms |= 1 << (room - length)
    out = np.empty(len(lengths), np.int64)
    out[order] = bins
    return out, n_bins


def cached_bins(split: Shards, sequence_length: int, seed: int, shuffle: bool, cache_dir: str | Path | None) -> Bins:
    """`pack`, kept in a file named after all that it depends on, and mapped from there.

    cache_dir: where (default: ~/.cache/gristmill/packing); made again where it is gone. Raises OSError where it cannot be
    written, ValueError for a file that is damaged.
    """
    facts = [_VERSION, identity(split), sequence_length, seed, shuffle, BLOCK_DOCUMENTS]
    directory = Path(cache_dir).expanduser() if cache_dir else default_cache()
    path = directory / f"best-fit-{hashlib.sha256(canonical_json(facts)).hexdigest()[:32]}.plan"
    if not path.is_file():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with exclusive(directory):  # ranks that begin together: one packs, the others read
                if not path.is_file():
                    _write(path, pack(split, sequence_length, seed, shuffle))
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot keep the packing plan in {directory}: {error.strerror}; name another packing_cache",
            ) from error
    return _read(path)


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gristmill" / "packing"


def _write(path: Path, bins: Bins) -> None:
    content = np.concatenate([bins.firsts, bins.starts, bins.lengths]).astype("<i8", copy=False)
    with atomic_file(path) as file:
        file.write(_head(len(bins), len(bins.starts), content).tobytes())
        file.write(content.data)


def _head(n_bins: int, n_pieces: int, content: np.ndarray) -> np.ndarray:
    """What a plan begins with, four int64; the rest is `firsts`, `starts`, `lengths`. `np.fromfile(path, "<i8")` reads it."""
    total = xxhash.xxh3_64_intdigest(content.data)
    return np.array([_MAGIC, n_bins, n_pieces, total - (1 << 63)], "<i8")


def _read(path: Path) -> Bins:
    if (size := path.stat().st_size) % 8 == 0 and size > 32:
        mapped = np.asarray(np.memmap(path, "<i8", "r"))
        _, n_bins, n_pieces, _ = mapped[:4].tolist()
        head, content = mapped[:4], mapped[4:]
        if len(content) == n_bins + 1 + 2 * n_pieces and np.array_equal(head, _head(n_bins, n_pieces, content)):
            return Bins(*np.split(content, [n_bins + 1, n_bins + 1 + n_pieces]))
    raise ValueError(f"{path} is not a whole packing plan: delete it, it is made again")
