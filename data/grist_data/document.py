"""The unit of text, and what a source can be divided into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Document(NamedTuple):
    """One text. `id` says where it is from in messages; what decides its split is the text itself.

    replaced: how many characters of it are U+FFFD because the source could not read what stood there.
    """

    text: str
    id: str
    source: str = ""
    replaced: int = 0


@dataclass(frozen=True)
class Piece:
    """Part of a source that can be read without what is before it.

    name: of the file, or of the whole. start, stop: where it begins and ends in that, in what the source counts there (bytes,
    groups of rows, rows); stop None: at its end. size: its bytes as they are stored, about.
    """

    name: str
    start: int = 0
    stop: int | None = None
    size: int = 0
