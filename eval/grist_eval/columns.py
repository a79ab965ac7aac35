"""Values of a row's columns, checked: every reader names the column, what it must hold, and what it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Columns = Mapping[str, Any]


def _value(row: Columns, column: str) -> Any:
    if column not in row:
        raise ValueError(f"no column {column!r}; the columns are {', '.join(row)}")
    return row[column]


def text(row: Columns, column: str) -> str:
    """A string, perhaps an empty one."""
    value = _value(row, column)
    if not isinstance(value, str):
        raise ValueError(f"{column!r} must be a string, but is {value!r}")
    return value


def words(row: Columns, column: str) -> str:
    """A string that is not empty."""
    value = text(row, column)
    if not value:
        raise ValueError(f"{column!r} must not be empty")
    return value


def texts(row: Columns, column: str, count: int | None = None) -> list[str]:
    """A list of strings that are not empty: `count` of them, or at least two."""
    value = _value(row, column)
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
    if listed is None or not all(isinstance(each, str) and each for each in listed):
        raise ValueError(f"{column!r} must be a list of strings that are not empty, but is {value!r}")
    if len(listed) != count and (count is not None or len(listed) < 2):
        wanted = "at least 2" if count is None else count
        raise ValueError(f"{column!r} must hold {wanted} strings, but holds {len(listed)}")
    return listed


def part(row: Columns, column: str) -> Columns:
    """Columns within a column."""
    value = _value(row, column)
    if not isinstance(value, Mapping):
        raise ValueError(f"{column!r} must hold named values, but is {value!r}")
    return value


def index(row: Columns, column: str, count: int) -> int:
    """A whole number from 0 to count - 1, or such a number as text."""
    value = _value(row, column)
    number = int(value) if isinstance(value, str) and value.strip().isdigit() else value
    if not isinstance(number, int) or not 0 <= number < count:
        raise ValueError(f"{column!r} must be a number from 0 to {count - 1}, but is {value!r}")
    return int(number)


def place(row: Columns, column: str, labels: Sequence[str]) -> int:
    """Where the text of a column stands among labels."""
    value = text(row, column).strip()
    if value not in labels:
        raise ValueError(f"{column!r} must be one of {', '.join(labels)}, but is {value!r}")
    return list(labels).index(value)


def labelled_choices(row: Columns, column: str = "choices", answer: str = "answerKey") -> tuple[list[str], int]:
    """Choices as ARC and OpenBookQA have them, `{"text": [...], "label": ["A", ...]}`, and the index of the right one."""
    choices = part(row, column)
    found = texts(choices, "text")
    return found, place(row, answer, texts(choices, "label", len(found)))
