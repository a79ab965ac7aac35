"""The unit of text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text. `id` says where it is from in messages; what decides its split is the text itself."""

    text: str
    id: str
    source: str = ""
