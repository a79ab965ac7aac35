"""Texts to measure a model on: whole files, or rows of JSON lines; one at a time, however many there are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from grist_eval.faults import sifted


class TextDocument(NamedTuple):
    """One text. domain: what its figures are summed under; where: file, or file:line, for messages."""

    text: str
    domain: str
    where: str


@dataclass(frozen=True)
class TextSources:
    """Files of texts.

    texts: UTF-8 files, each one document; its domain is its folder's name. rows: JSON lines, each with a string in
    `text_column`; their domain is that in `domain_column`, or the file's name without suffix where there is no such column.
    """

    texts: tuple[Path, ...] = ()
    rows: tuple[Path, ...] = ()
    text_column: str = "text"
    domain_column: str | None = None


def check_documents(sources: TextSources) -> int:
    """Read everything once, and count the documents.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming file and line of every bad row (the first ten); no document at all.
    """
    count = sum(1 for _ in sifted(_found(sources)))
    if not count:
        names = ", ".join(map(str, [*sources.texts, *sources.rows]))
        raise ValueError(
            f"no documents in {names or 'no files'}: expected texts, or JSON lines with {sources.text_column!r}"
        )
    return count


def read_documents(sources: TextSources) -> Iterator[TextDocument]:
    """The documents in the order of the files. Raises as `check_documents` does, when all others have been given."""
    return sifted(_found(sources))


def _found(sources: TextSources) -> Iterator[TextDocument | ValueError]:
    for path in [*sources.texts, *sources.rows]:
        if not path.is_file():
            raise FileNotFoundError(f"no such file of texts: {path}")
    for path in sources.texts:
        yield _document(path.read_bytes(), path.resolve().parent.name, str(path))
    for path in sources.rows:
        with path.open("rb") as file:
            yield from _rows(file, path, sources)


def _rows(lines: Iterable[bytes], path: Path, sources: TextSources) -> Iterator[TextDocument | ValueError]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield _row(line, where, path.stem, sources)
            except ValueError as error:
                yield ValueError(f"{where}: {error}")


def _row(line: bytes, where: str, domain: str, sources: TextSources) -> TextDocument:
    row = json_object(line)
    text = _string(row, sources.text_column)
    if not text:
        raise ValueError(f"{sources.text_column!r} must not be empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no text
        raise ValueError(f"{sources.text_column!r} is no text that UTF-8 can hold ({error.reason})") from None
    if sources.domain_column is not None:
        domain = _string(row, sources.domain_column)
    return TextDocument(text, domain, where)


def json_object(line: bytes) -> dict[str, Any]:
    """A line of a file as the object that it spells. Raises ValueError for anything else."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a line of JSON in UTF-8 ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with named columns, got {type(row).__name__}")
    return row


def _string(row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise ValueError(f"no column {column!r}; the columns are {', '.join(row)}")
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{column!r} must be a string, but is {value!r:.60}")
    return value


def _document(data: bytes, domain: str, where: str) -> TextDocument | ValueError:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return ValueError(f"{where}: not UTF-8 ({error})")
    return TextDocument(text, domain, where) if text else ValueError(f"{where}: the file is empty")
