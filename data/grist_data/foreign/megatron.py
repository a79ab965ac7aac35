"""Megatron-LM's indexed datasets: ids in NAME.bin, and in NAME.idx which of them make a sequence and a document.

NAME.idx, little-endian (megatron/core/datasets/indexed_dataset.py): 9 bytes magic, u64 version, u8 code of the type, u64
sequences S, u64 length D of the document index, then S int32 lengths in ids, S int64 offsets in bytes, D int64 numbers of the
sequences at which documents begin (the last is S). The arrays are not aligned.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from grist_data.atomic import atomic_file
from grist_data.foreign.token_file import PIECE_TOKENS, FlatFile
from grist_data.shards import Shards

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {code: np.dtype(f"<{kind}") for code, kind in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}.items()}
_HEAD = struct.Struct("<9sQBQQ")


class IndexedFile:
    """A pair of NAME.bin and NAME.idx. A document is what the document index says, of one or more sequences.

    Keeps 8 bytes a document in memory, for a moment as many a sequence; the ids and the index itself are mapped.
    """

    has_documents = True

    def __init__(self, path: Path) -> None:
        """path: NAME, NAME.bin or NAME.idx. Raises ValueError for a pair that is truncated, of another version or at odds."""
        self.path = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
        index = Path(f"{self.path}.idx")
        if not index.is_file():
            raise FileNotFoundError(f"no index at {index}: Megatron's NAME.bin comes with a NAME.idx")
        self.dtype, lengths, pointers, documents = _read_index(index)
        self._ends = _document_ends(index, self.dtype, lengths, pointers, documents)
        total = int(self._ends[-1]) if len(self._ends) else 0
        self._flat = FlatFile(Path(f"{self.path}.bin"), self.dtype)
        if self._flat.n_tokens != total:
            raise ValueError(
                f"{self._flat.path} has {self._flat.n_tokens:,} ids, but {index} describes {total:,}: one of the two is"
                " truncated or belongs to another dataset; copy both again"
            )
        self.n_tokens = total

    def pieces(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for at in range(start, stop, PIECE_TOKENS):
            until = min(stop, at + PIECE_TOKENS)
            first, last = np.searchsorted(self._ends, (at + 1, until + 1)).tolist()
            yield self._flat.tokens[at:until], self._ends[first:last]

    def where(self, token: int) -> str:
        return self._flat.where(token)


def read(path: Path) -> IndexedFile:
    return IndexedFile(path)


def _read_index(index: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    size = index.stat().st_size
    with open(index, "rb") as file:
        page = file.read(_HEAD.size)
    if page[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{index} is no index of Megatron's: it begins with {page[:9]!r}, expected {MAGIC!r}")
    if len(page) < _HEAD.size:
        raise ValueError(
            f"{index} is truncated: {size} bytes, shorter than its {_HEAD.size}-byte header; copy it again"
        )
    _, version, code, n_sequences, n_documents = _HEAD.unpack(page)
    if version != VERSION:
        raise ValueError(f"{index} has version {version} at byte 9, but this program reads version {VERSION}")
    if code not in DTYPES:
        raise ValueError(f"{index} has type code {code} at byte 17, expected an integer's: one of {[*DTYPES]}")
    needed = _HEAD.size + 12 * n_sequences + 8 * n_documents
    if size < needed:
        raise ValueError(
            f"{index} is truncated: {n_sequences:,} sequences and {n_documents:,} entries of the document index take"
            f" {needed:,} bytes, but it has {size:,}; copy it again"
        )
    # Behind these, multimodal datasets keep one byte for each sequence.
    mapped = np.memmap(index, np.uint8, "r")
    at = [_HEAD.size, _HEAD.size + 4 * n_sequences, _HEAD.size + 12 * n_sequences, needed]
    lengths, pointers, documents = (
        mapped[start:stop].view(kind) for start, stop, kind in zip(at[:3], at[1:], ("<i4", "<i8", "<i8"), strict=True)
    )
    return DTYPES[code], lengths, pointers, documents


def _document_ends(
    index: Path, dtype: np.dtype, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray
) -> np.ndarray:
    """(documents,) int64 ends in ids, equal for documents of no ids; sequences must lie one behind the other."""
    ends = np.cumsum(lengths, dtype=np.int64)
    for at in range(0, len(ends), PIECE_TOKENS):
        piece = slice(at, at + PIECE_TOKENS)
        expected = (ends[piece] - lengths[piece]) * dtype.itemsize
        if len(wrong := np.flatnonzero((pointers[piece] != expected) | (lengths[piece] < 0))):
            k = int(wrong[0])
            raise ValueError(
                f"{index}: sequence {at + k:,} should begin at byte {int(expected[k]):,} of the .bin, behind the one before it,"
                f" but the index says {int(pointers[at + k]):,} (byte {_HEAD.size + 4 * len(ends) + 8 * (at + k):,}); write the"
                " pair again with Megatron's tools/merge_datasets.py"
            )
    if documents[:1].tolist() + documents[-1:].tolist() != [0, len(ends)]:
        raise ValueError(_BAD_DOCUMENTS.format(index=index, sequences=len(ends)))
    if len(ends) == 0:
        raise ValueError(f"{index} describes no sequences: the dataset is empty")
    found = [np.zeros(0, np.int64)]
    for at in range(1, len(documents), PIECE_TOKENS):
        numbers = documents[at : at + PIECE_TOKENS]
        if (np.diff(numbers, prepend=documents[at - 1]) < 0).any() or numbers[-1] > len(ends):
            raise ValueError(_BAD_DOCUMENTS.format(index=index, sequences=len(ends)))
        found.append(np.where(numbers > 0, ends[numbers - 1], 0))
    return np.concatenate(found)


_BAD_DOCUMENTS = (
    "{index}: the document index must rise from 0 to the number of sequences, {sequences:,}, but it does not; the file is"
    " damaged, copy it again"
)


def dtype_for(vocab_size: int) -> np.dtype:
    """Megatron's own choice (DType.optimal_dtype)."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def write(prefix: Path, shards: Shards) -> None:
    """Write a split as PREFIX.bin and PREFIX.idx, every document one sequence; the .idx, which makes it a dataset, last.

    Raises ValueError for a document of more than 2^31 - 1 tokens.
    """
    dtype = dtype_for(shards.vocab_size)
    path = Path(f"{prefix}.bin")
    with (
        atomic_file(path) as file,
        tqdm(total=shards.n_tokens, desc=path.name, unit=" tokens", unit_scale=True, disable=None) as bar,
    ):
        for start in range(0, shards.n_tokens, PIECE_TOKENS):
            ids = shards.read(start, min(PIECE_TOKENS, shards.n_tokens - start))
            file.write(ids.astype(dtype).tobytes())
            bar.update(len(ids))
    with atomic_file(Path(f"{prefix}.idx")) as file:
        _write_index(file, shards, dtype)


def _write_index(file: BinaryIO, shards: Shards, dtype: np.dtype) -> None:
    code = next(code for code, kind in DTYPES.items() if kind == dtype)
    file.write(_HEAD.pack(MAGIC, VERSION, code, shards.n_docs, shards.n_docs + 1))
    for start, ends in _ends_in_pieces(shards):
        lengths = np.diff(ends, prepend=start)
        if int(lengths.max()) > np.iinfo(np.int32).max:
            raise ValueError(f"a document of {int(lengths.max()):,} tokens is too long for Megatron's 32-bit lengths")
        file.write(lengths.astype("<i4").tobytes())
    for start, ends in _ends_in_pieces(shards):
        begins = np.concatenate([[start], ends[:-1]])
        file.write((begins * dtype.itemsize).astype("<i8").tobytes())
    for start in range(0, shards.n_docs + 1, PIECE_TOKENS):
        file.write(np.arange(start, min(start + PIECE_TOKENS, shards.n_docs + 1), dtype="<i8").tobytes())


def _ends_in_pieces(shards: Shards) -> Iterator[tuple[int, np.ndarray]]:
    """(begin of the first document, ends of some documents) over the whole split, in tokens."""
    start = begin = 0
    for shard in shards.shards:
        for at in range(0, shard.header.n_docs, PIECE_TOKENS):
            ends = shard.doc_ends[at : at + PIECE_TOKENS] + begin
            yield start, ends
            start = int(ends[-1])
        begin += shard.header.n_tokens
