"""Spans: the pieces of a source that processes and machines read on their own, the same whoever reads them.

A source is a function `documents`. The module that holds it may offer more, with the same keyword options:

    pieces(span_bytes, **options) -> list[Piece]        what can be read without what is before it, in order
    read_piece(piece, **options) -> Iterator[Document]  the documents of one; those of all, in order, are `documents`
    stream(state, **options)                            see spool.py; for what should be read once
    facts(**options) -> dict                            what to record about it in dataset.json, such as its revision

Without `pieces` the source is one span.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from grist_data import spool
from grist_data.atomic import canonical_json
from grist_data.document import Document, Piece
from grist_data.manifest import SPOOL_DIRECTORY
from grist_data.sources import SOURCES

# A unit that ends with its span is smaller than asked for: one in four.
_UNITS_IN_A_SPAN = 4


@dataclass(frozen=True)
class Span:
    """Consecutive pieces of a source; none: all of a source that cannot be divided."""

    pieces: tuple[Piece, ...] = ()

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def digest(self) -> str:
        """16 hex digits that change with where the span begins and ends."""
        return hashlib.sha256(canonical_json([asdict(piece) for piece in self.pieces])).hexdigest()[:16]

    def to_json(self) -> list[list[Any]]:
        return [list(astuple(piece)) for piece in self.pieces]

    @classmethod
    def from_json(cls, values: list[list[Any]]) -> Span:
        return cls(tuple(Piece(*piece) for piece in values))

    def __str__(self) -> str:
        names = [piece.name for piece in self.pieces]
        if not names:
            return "the source"
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return names[0] + more + (f" from {self.pieces[0].start:,} on" if self.pieces[0].start else "")


class Reader:
    """The spans of a source and their documents.

    name, options: of the source. span_bytes: what a span holds at least, as it is stored. directory: of the dataset.
    """

    def __init__(self, name: str, options: dict[str, Any], unit_bytes: int, directory: Path) -> None:
        self._documents, self._options = SOURCES[name], options
        self._span_bytes = _UNITS_IN_A_SPAN * unit_bytes
        self._spool = directory / SPOOL_DIRECTORY
        module = sys.modules.get(getattr(self._documents, "__module__", ""))
        # A function put into SOURCES by hand is all there is to that source, wherever it was written.
        self._module: Any = module if getattr(module, "documents", None) is self._documents else ModuleType(name)
        stream = getattr(self._module, "stream", None)
        self._stream = stream if stream is not None and options.get("streaming") else None

    @property
    def is_stream(self) -> bool:
        return self._stream is not None

    def store_stream(self) -> None:
        """Read a stream once, to the disk, or go on doing it; nothing to do for other sources."""
        if self._stream is not None:
            spool.fill(self._spool, partial(self._stream, **self._options), self._span_bytes)

    def spans(self) -> list[Span]:
        if self._stream is not None:
            return [Span((piece,)) for piece in spool.pieces(self._spool)]
        if not hasattr(self._module, "pieces"):
            return [Span()]
        return list(_grouped(self._module.pieces(span_bytes=self._span_bytes, **self._options), self._span_bytes))

    def documents(self, span: Span) -> Iterator[Document]:
        if self._stream is not None:
            return spool.read(self._spool, span.pieces[0])
        if not span.pieces:
            return self._documents(**self._options)
        return itertools.chain.from_iterable(self._module.read_piece(piece, **self._options) for piece in span.pieces)

    def facts(self) -> dict[str, Any]:
        return self._module.facts(**self._options) if hasattr(self._module, "facts") else {}


def digest_of(spans: list[Span]) -> str:
    return hashlib.sha256("".join(span.digest for span in spans).encode()).hexdigest()


def _grouped(pieces: Iterable[Piece], span_bytes: int) -> Iterator[Span]:
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += piece.size
        if size >= span_bytes:
            yield Span(tuple(group))
            group, size = [], 0
    if group:
        yield Span(tuple(group))
