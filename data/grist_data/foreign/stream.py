"""The files of a split as one stream of ids, where its documents end, and a first reading that checks everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash
from tqdm import tqdm

from grist_data.foreign.token_file import NO_ENDS, TokenFile


@dataclass(frozen=True)
class Boundaries:
    """How documents are found. kind: 'stored' (the format says), 'after' or 'before' every id `marker`, 'file' (one a file).

    A document that is found by markers may go on in the next file of its split; others may not.
    """

    kind: Literal["stored", "after", "before", "file"]
    marker: int | None = None


class Stream:
    """All files of a split, ids numbered through. n_tokens: of all. Raises ValueError for a format without the boundaries."""

    def __init__(self, files: Sequence[TokenFile], boundaries: Boundaries) -> None:
        for file in files:
            if boundaries.kind == "stored" and not file.has_documents:
                raise ValueError(
                    f"{file.path} does not say where documents end: give the id after every document (end_of_document), the"
                    " id before every document (begin_of_document), or document_per_file"
                )
        self.files, self.boundaries = tuple(files), boundaries
        self._starts = [0, *np.cumsum([file.n_tokens for file in files], dtype=np.int64).tolist()]
        self.n_tokens: int = self._starts[-1]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Ids [start, stop): (position p of the first, n ids, ends of documents, rising, in [p, p + n])."""
        for file, begin, end in zip(self.files, self._starts, self._starts[1:], strict=False):
            if end <= start or begin >= stop:
                continue
            position = max(start, begin)
            for ids, stored in file.pieces(position - begin, min(stop, end) - begin):
                yield position, ids, self._ends(position, ids, stored + begin, end)
                position += len(ids)

    def where(self, position: int) -> str:
        k = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self.files[k].where(position - self._starts[k])

    def _ends(self, position: int, ids: np.ndarray, stored: np.ndarray, file_end: int) -> np.ndarray:
        kind = self.boundaries.kind
        if kind in ("after", "before"):
            return np.flatnonzero(ids == self.boundaries.marker) + (position + (kind == "after"))
        of_file = np.array([file_end]) if position + len(ids) == file_end else NO_ENDS
        return np.union1d(stored, of_file) if kind == "stored" else of_file


@dataclass(frozen=True)
class Survey:
    """What a first reading of a split found.

    cuts: where its shards end, each also the end of a document; the last is n_tokens. documents: those with ids.
    digest: xxh3_64 of all ids as stored, then of all ends. eot_after_all: every document ends with the end-of-text id.
    """

    cuts: tuple[int, ...]
    documents: int
    digest: str
    eot_after_all: bool


def survey(stream: Stream, vocab_size: int, eot_id: int | None, shard_tokens: int) -> Survey:
    """Read a split once.

    Raises ValueError for a type too narrow for the vocabulary, an id outside of it (with its place), a marker that never
    comes, and a split without ids.
    """
    for file in stream.files:
        _check_dtype(file, vocab_size)
    if stream.n_tokens == 0:
        raise ValueError(f"there are no ids in {', '.join(str(file.path) for file in stream.files)}")
    cuts, last_end, documents, without_eot, previous = [0], 0, 0, 0, -1
    of_ids, of_ends = xxhash.xxh3_64(), xxhash.xxh3_64()
    bar = tqdm(total=stream.n_tokens, desc="checking", unit=" tokens", unit_scale=True, disable=None, leave=False)
    with bar:
        for position, ids, ends in stream.pieces(0, stream.n_tokens):
            _check_ids(stream, position, ids, vocab_size)
            if position + len(ids) == stream.n_tokens:
                ends = np.union1d(ends, [stream.n_tokens])
            ends = ends[ends > last_end]
            of_ids.update(ids.tobytes())
            of_ends.update(ends.astype("<i8").tobytes())
            if len(ends):
                last_ids = np.concatenate([[previous], ids])[ends - position]
                without_eot += int((last_ids != (-1 if eot_id is None else eot_id)).sum())
                documents, last_end = documents + len(ends), int(ends[-1])
                cuts += _cuts(ends, cuts[-1], shard_tokens)
            previous = int(ids[-1])
            bar.update(len(ids))
    if cuts[-1] < stream.n_tokens:
        cuts.append(stream.n_tokens)
    _check_marker(stream, documents, previous)
    return Survey(tuple(cuts[1:]), documents, of_ids.hexdigest() + of_ends.hexdigest(), without_eot == 0)


def _check_dtype(file: TokenFile, vocab_size: int) -> None:
    if vocab_size - 1 > np.iinfo(file.dtype).max:
        raise ValueError(
            f"{file.path} holds {file.dtype.name} ids, too narrow for the tokenizer's vocabulary of {vocab_size:,}: larger ids"
            " were cut when it was written, or this is not its tokenizer (or, for nanoGPT's files, give the dtype)"
        )


def _check_ids(stream: Stream, position: int, ids: np.ndarray, vocab_size: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        k = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        raise ValueError(
            f"{stream.where(position + k)}: id {int(ids[k]):,} is outside the tokenizer's vocabulary of {vocab_size:,} ids:"
            " this is not the tokenizer that the ids mean, not their type, or the file is damaged"
        )


def _cuts(ends: np.ndarray, last: int, shard_tokens: int) -> list[int]:
    """Ends that are at least `shard_tokens` behind the cut before them."""
    cuts = []
    while (k := int(np.searchsorted(ends, last + shard_tokens))) < len(ends):
        last = int(ends[k])
        cuts.append(last)
    return cuts


def _check_marker(stream: Stream, documents: int, last_id: int) -> None:
    kind, marker = stream.boundaries.kind, stream.boundaries.marker
    seen = documents > 1 or last_id == marker or next(stream.pieces(0, 1))[1][0] == marker
    if kind in ("after", "before") and not seen:
        raise ValueError(
            f"id {marker} never comes in {stream.files[0].path}{' and the files after it' * (len(stream.files) > 1)}, so it"
            f" does not stand {kind} documents: give the right id, or document_per_file"
        )
