"""Documents of .txt files, whole or divided at a separator, and of .jsonl files, a line each."""

from __future__ import annotations

import importlib
import json
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grist_data.document import REPLACEMENT, Document
from grist_data.sources import compressed
from grist_data.sources.columns import Columns

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """Bytes [start, stop) of a file (stop None: to its end), beginning and ending between documents.

    name: what messages call the file.
    """

    path: Path
    name: str
    start: int = 0
    stop: int | None = None

    def blocks(self) -> Iterator[bytes]:
        return compressed.blocks(self.path, self.name, _READ_BYTES, self.start, self.stop)

    def line(self, number: int) -> str:
        """A line of it, counted from 1, in messages: nobody has counted those before it."""
        return f"{self.name}:{number}" + (f" after byte {self.start}" if self.start else "")


def cuts(path: Path, separator: str, span_bytes: int) -> list[int]:
    r"""Places to divide a plain file at: each after the first separator that begins `span_bytes` or more after the last.

    A separator that ends as it begins ('\n\n') may overlap itself, and one with '\r' the end of a line; then what it divides
    depends on what is before, and there is no such place.
    """
    overlaps = any(separator[:n] == separator[-n:] for n in range(1, len(separator)))
    size = path.stat().st_size
    if not separator or overlaps or "\r" in separator or size <= span_bytes:
        return []
    mark = re.compile(re.escape(separator.encode()).replace(b"\\\n", b"\r?\n"))
    found: list[int] = []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while match := mark.search(data, (found[-1] if found else 0) + span_bytes):
            if match.end() == size:
                break
            found.append(match.end())
    return found


def text_documents(part: Part, separator: str | None, errors: str) -> Iterator[Document]:
    """UTF-8 never contains one character's bytes inside another's, so bytes can be split before they are decoded."""
    mark = (separator or "").encode()
    pending, searched, line, number = bytearray(), 0, 1, 0
    for block in _with_plain_newlines(part):
        pending += block
        while mark and (end := pending.find(mark, searched)) >= 0:
            yield _text_document(part, bytes(pending[:end]), line, number, errors)
            line += pending.count(b"\n", 0, end + len(mark))
            del pending[: end + len(mark)]
            searched, number = 0, number + 1
        searched = max(0, len(pending) - len(mark) + 1)
    if part.stop is None or pending:  # a part that is not the last ends with a separator
        yield _text_document(part, bytes(pending), line, number, errors)


def _text_document(part: Part, data: bytes, line: int, number: int, errors: str) -> Document:
    if number == 0 and part.start == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    text, replaced = decode(data, errors, part, line)
    id_ = f"{part.name}#{number}" + (f" after byte {part.start}" if part.start else "")
    return Document(text, id_, "files", replaced)


def _with_plain_newlines(part: Part) -> Iterator[bytes]:
    """The part's bytes in blocks, \\r\\n as \\n."""
    held = b""
    for block in part.blocks():
        block = held + block
        held = b"\r" if block.endswith(b"\r") else b""  # its \n may open the next block
        yield block[: len(block) - len(held)].replace(b"\r\n", b"\n")
    yield held


def decode(data: bytes, errors: str, part: Part, line: int) -> tuple[str, int]:
    """The text, and how many characters of it replace what is not UTF-8."""
    try:
        return data.decode(), 0
    except UnicodeDecodeError as error:
        if errors == "replace":
            text = data.decode("utf-8", errors)
            return text, text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())
        line += data.count(b"\n", 0, error.start)
        raise ValueError(
            f"{part.line(line)}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file (for instance with iconv), or"
            " use errors=replace"
        ) from error


def json_documents(part: Part, columns: Columns) -> Iterator[Document]:
    quick = _quick_parser(columns)
    for line, data in _filled_lines(part):
        where = part.line(line)
        row, replaced = quick(data), 0
        if row is None:
            row, replaced = _parsed(part, line, data, columns.errors)
        try:
            values = [row[column] for column in columns.names]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: {_missing(row, columns.names)}") from error
        yield columns.document(values, where, replaced)


def json_rows(part: Part, errors: str) -> Iterator[tuple[str, Any, int]]:
    """File and line, and value, of every line, and how many characters of it replace what is not UTF-8."""
    for line, data in _filled_lines(part):
        yield part.line(line), *_parsed(part, line, data, errors)


def _filled_lines(part: Part) -> Iterator[tuple[int, bytes]]:
    return ((line, data) for line, data in enumerate(_lines(part), 1) if data and not data.isspace())


def _parsed(part: Part, line: int, data: bytes, errors: str) -> tuple[Any, int]:
    """The value, and how many characters of the line replace what is not UTF-8."""
    text, replaced = decode(data, errors, part, line)
    try:
        return json.loads(text), replaced
    except json.JSONDecodeError as error:
        raise ValueError(f"{part.line(line)}: not valid JSON: {error.msg} at column {error.colno}") from error


def _quick_parser(columns: Columns) -> Callable[[bytes], Any]:
    """Row of a line by orjson, where that is installed; None for a line that is left to json.

    orjson takes less than json does (no NaN, no half of a UTF-16 pair) and reads texts the same. Numbers of more than 64 bits
    it does not, so it is asked for a column of texts alone, and what is no text there is json's to complain of.
    """
    try:
        orjson = importlib.import_module("orjson")
    except ImportError:
        return lambda line: None
    if columns.numbers:
        return lambda line: None
    (name,) = columns.names

    def parse(line: bytes) -> Any:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            return None
        return row if type(row) is dict and type(row.get(name)) is str else None

    return parse


def _missing(row: object, names: Sequence[str]) -> str:
    if not isinstance(row, dict):
        return f"expected an object with the key {names[0]!r}, but got {type(row).__name__}"
    absent = next(name for name in names if name not in row)
    return f"expected an object with the key {absent!r}, but got the keys {', '.join(row)}"


def _lines(part: Part) -> Iterator[bytes]:
    pending: list[bytes] = []
    for block in part.blocks():
        first, *rest = block.split(b"\n")
        pending.append(first)
        for start in rest:
            yield b"".join(pending)
            pending = [start]
    if pending:
        yield b"".join(pending)
