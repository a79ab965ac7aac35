"""Rows that are none: all of a file are looked for, and the first are shown by file and line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

SHOWN = 10
Row = TypeVar("Row")


def sifted(found: Iterable[Row | ValueError]) -> Iterator[Row]:
    """The rows among what a reader found.

    Raises:
        ValueError: at the end, with the messages of the first `SHOWN` that are errors, and how many there are.
    """
    shown: list[str] = []
    count = 0
    for row in found:
        if not isinstance(row, ValueError):
            yield row
            continue
        count += 1
        if count <= SHOWN:
            shown.append(str(row))
    if count:
        more = f"\n... and {count - SHOWN} more" if count > SHOWN else ""
        raise ValueError(f"{count} bad row(s):\n" + "\n".join(shown) + more)
