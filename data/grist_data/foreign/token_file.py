"""What every format is read as: one long row of ids in pieces, with the ends of documents where the format has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

# Pieces this long keep the memory of every command flat, and are long enough that numpy's cost per call does not show.
PIECE_TOKENS = 1 << 18
NO_ENDS = np.zeros(0, np.int64)


class TokenFile(Protocol):
    """One file (or pair of files) of ids.

    path: for messages. dtype: of an id as stored. n_tokens: all ids. has_documents: whether the format has the ends
    of documents.
    """

    path: Path
    dtype: np.dtype
    n_tokens: int
    has_documents: bool

    def pieces(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids [start, stop) in pieces, in order, each with the ends of documents in it.

        Ends are exclusive, int64, never falling (equal ones are documents without ids), counted from the beginning of the
        file; those of a piece that begins at s and has n ids lie in [s, s + n].
        """
        ...

    def where(self, token: int) -> str:
        """The place of an id, for messages: file, and byte or row."""
        ...


class FlatFile:
    """Ids one after the other behind a header of `offset` bytes, mapped into memory."""

    has_documents = False

    def __init__(self, path: Path, dtype: np.dtype, offset: int = 0, n_tokens: int | None = None) -> None:
        """n_tokens: as a header says. Raises ValueError when the size of the file does not fit."""
        if not path.is_file():
            raise FileNotFoundError(f"no token file at {path}")
        size = path.stat().st_size
        body = size - offset
        if body <= 0:
            raise ValueError(f"{path} has no tokens: it is {size:,} bytes long")
        if n_tokens is not None and body != n_tokens * dtype.itemsize:
            what = "truncated" if body < n_tokens * dtype.itemsize else "too long"
            raise ValueError(
                f"{path} is {what}: its header announces {n_tokens:,} ids of {dtype.itemsize} bytes, so"
                f" {offset + n_tokens * dtype.itemsize:,} bytes, but it has {size:,}; copy it again"
            )
        if body % dtype.itemsize:
            raise ValueError(
                f"{path} has {size:,} bytes, no whole number of {dtype.name} ids: it is truncated, or of another type;"
                " copy it again, or give its type"
            )
        self.path, self.dtype, self.offset = path, dtype, offset
        self.n_tokens = body // dtype.itemsize
        self.tokens = np.memmap(path, dtype, "r", offset, (self.n_tokens,))

    def pieces(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for at in range(start, stop, PIECE_TOKENS):
            yield self.tokens[at : min(stop, at + PIECE_TOKENS)], NO_ENDS

    def where(self, token: int) -> str:
        return f"{self.path}, byte {self.offset + token * self.dtype.itemsize:,}"
