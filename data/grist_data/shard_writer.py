"""Write one token shard: streamed under a temporary name, summed on the way, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from grist_data.atomic import atomic_file
from grist_data.shard_header import (
    BLOCK_BYTES,
    DOC_HASH_BYTES,
    HEADER_BYTES,
    SECTIONS,
    SUMMED_SECTIONS,
    Encoding,
    Header,
    pack,
    padded,
    root_of,
    sum_of,
)


def token_bytes_for(vocab_size: int, token_dtype: str = "auto") -> int:
    """2 when every id of the vocabulary fits 16 bits, else 4. token_dtype: 'auto', 'uint16' or 'uint32'.

    Raises ValueError when uint16 is asked for and the vocabulary is too large for it.
    """
    if token_dtype not in ("auto", "uint16", "uint32"):
        raise ValueError(f"token_dtype must be 'auto', 'uint16' or 'uint32', but got {token_dtype!r}")
    fits = vocab_size <= 1 << 16
    if token_dtype == "uint16" and not fits:
        raise ValueError(
            f"vocabulary too large for uint16: {vocab_size:,} ids, but 16 bits hold 65,536; use token_dtype='uint32' or"
            " 'auto', or a smaller vocabulary"
        )
    return 2 if fits and token_dtype != "uint32" else 4


def write_shard(
    path: Path,
    encoding: Encoding,
    tokens: Iterable[np.ndarray],
    doc_ends: np.ndarray,
    doc_hashes: bytes,
    metadata: dict[str, Any],
    shard: int = 0,
    n_shards: int = 1,
    loss_mask: Iterable[np.ndarray] | None = None,
) -> Header:
    """Write a shard and return its header; equal content gives equal bytes.

    tokens: ids of the documents one after the other, in pieces of any length and integer type.
    doc_ends: (documents,) exclusive end of each in tokens. doc_hashes: 16 bytes a document.
    metadata: small JSON object. loss_mask: bool, of each token whether it counts as a target, in pieces of any length; None for
    no mask. Raises ValueError for ids outside the vocabulary, and ends or a mask that do not fit the tokens.
    """
    n_docs = len(doc_ends)
    if len(doc_hashes) != n_docs * DOC_HASH_BYTES:
        raise ValueError(
            f"expected {DOC_HASH_BYTES} bytes of hash for each of {n_docs} texts, but got {len(doc_hashes)}"
        )
    with atomic_file(path) as file:
        writer = _SectionWriter(file)
        n_tokens = sum(writer.add(_checked(piece, encoding)) for piece in tokens) // encoding.token_bytes
        writer.end("tokens")
        _check_ends(doc_ends, n_tokens)
        for name, pieces in (
            ("doc_ends", [doc_ends.astype("<u8").tobytes()]),
            ("doc_hash", [doc_hashes]),
            ("loss_mask", () if loss_mask is None else _packed(loss_mask, n_tokens)),
            ("json", [json.dumps(metadata, sort_keys=True).encode()]),
        ):
            for data in pieces:
                writer.add(data)
            writer.end(name)
        writer.add(b"".join(writer.sums[name].tobytes() for name in SUMMED_SECTIONS))
        writer.end("block_sums")
        sections = {name: writer.sections[name] for name in SECTIONS}
        header = Header(n_tokens, n_docs, encoding, sections, shard, n_shards, root_of(writer.sums))
        # The content is on the disk before a header says that it is there.
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        file.write(pack(header))
    return header


class _SectionWriter:
    """Appends sections, each padded to whole pages, and sums their blocks."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._begin(HEADER_BYTES)
        file.write(bytes(HEADER_BYTES))
        self.sections: dict[str, tuple[int, int]] = {}
        self.sums: dict[str, np.ndarray] = {}

    def _begin(self, offset: int) -> None:
        self._offset, self._size, self._tail, self._block_sums = offset, 0, b"", []

    def add(self, data: bytes) -> int:
        self._file.write(data)
        self._size += len(data)
        missing = BLOCK_BYTES - len(self._tail)  # until the block that earlier calls began is full
        self._tail += data[:missing]
        if len(self._tail) == BLOCK_BYTES:
            self._block_sums.append(sum_of(self._tail))
            view = memoryview(data)[missing:]
            whole = len(view) // BLOCK_BYTES * BLOCK_BYTES
            self._block_sums += [sum_of(view[at : at + BLOCK_BYTES]) for at in range(0, whole, BLOCK_BYTES)]
            self._tail = bytes(view[whole:])
        return len(data)

    def end(self, name: str) -> None:
        if self._tail:
            self._block_sums.append(sum_of(self._tail))
        self.sections[name] = (self._offset, self._size)
        self.sums[name] = np.array(self._block_sums, "<u8")
        end = self._offset + padded(self._size)
        self._file.write(bytes(end - self._offset - self._size))
        self._begin(end)


def _checked(piece: np.ndarray, encoding: Encoding) -> bytes:
    if len(piece) and int(piece.max()) >= encoding.vocab_size:
        raise ValueError(f"token id {int(piece.max())} is outside the vocabulary of {encoding.vocab_size} ids")
    return piece.astype(encoding.dtype).tobytes()


def _packed(pieces: Iterable[np.ndarray], n_tokens: int) -> Iterator[bytes]:
    """A bit a token: bit k % 8, counted from the lowest, of byte k // 8 is that of token k."""
    rest, n = np.zeros(0, bool), 0
    for piece in pieces:
        n += len(piece)
        rest = np.concatenate([rest, piece])
        whole = len(rest) // 8 * 8
        yield np.packbits(rest[:whole], bitorder="little").tobytes()
        rest = rest[whole:]
    yield np.packbits(rest, bitorder="little").tobytes()
    if n != n_tokens:
        raise ValueError(f"expected a loss mask of {n_tokens} tokens, but got {n}")


def _check_ends(doc_ends: np.ndarray, n_tokens: int) -> None:
    lengths = np.diff(doc_ends.astype(np.int64), prepend=0)
    if (lengths <= 0).any() or (int(doc_ends[-1]) if len(doc_ends) else 0) != n_tokens:
        raise ValueError(f"document ends must rise and end at the number of tokens ({n_tokens}), but they do not")
