"""Files of text: .txt, .jsonl, .parquet and .arrow, here or at an address; single files, directories and globs."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path

from grist_data.document import Document
from grist_data.sources import compressed, remote, tables
from grist_data.sources.columns import Columns, columns_of

SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow")
_READ_BYTES = 1 << 20


def documents(
    paths: tuple[str, ...],
    text_column: str | None = None,
    separator: str | None = None,
    errors: str = "strict",
    template: str | None = None,
    cache_dir: str | None = None,
) -> Iterator[Document]:
    r"""One document a text file, a line of .jsonl, or a row of .parquet or .arrow.

    paths: files, directories (searched through, hidden names left out) or globs ('books/**/*.txt'), or addresses of such
        ('s3://bucket/books/*.txt'), which are read through fsspec.
    text_column: key or column that holds the text (default 'text').
    separator: text that divides a .txt file into documents, such as '<|endoftext|>' or '\n\n\n'; it is dropped.
    errors: 'strict' refuses what is not UTF-8, 'replace' puts U+FFFD in its place.
    template: instead of text_column, a document of several columns, such as '{title}\n\n{text}'; they hold texts or whole
        numbers, and {{ and }} are braces.
    cache_dir: where copies of files at addresses are kept (default: ~/.cache/gristmill/files).
    In .txt files a leading byte order mark is dropped and \r\n becomes \n.
    Raises FileNotFoundError for a path that matches nothing, ValueError naming file and line or row for malformed content,
    ImportError naming the package that a kind of file or address needs.
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors must be 'strict' or 'replace', but got {errors!r}")
    if separator == "":
        raise ValueError("separator is empty: give the text that stands between documents, or leave it out")
    columns = columns_of(text_column, template, errors)
    for name in find(paths):
        path = remote.local_copy(name, cache_dir) if remote.is_remote(name) else Path(name)
        kind = compressed.kind_of(path.name)
        if kind == "txt":
            if template is not None:
                raise ValueError(
                    f"{name}: a .txt file has no columns for the template {template!r}; leave such files out"
                )
            yield from _text_documents(path, name, separator, errors)
        elif kind == "jsonl":
            yield from _json_documents(path, name, columns)
        else:
            yield from tables.documents(path, name, kind, columns)


def find(paths: tuple[str, ...]) -> list[str]:
    """Every file that the paths name, each once, in an order that does not depend on the file system."""
    if not paths:
        raise ValueError("the files source needs paths: files, directories or globs")
    found: dict[str, None] = {}
    for name in paths:
        matches = remote.find(name, SUFFIXES) if remote.is_remote(name) else _find_here(name)
        if not matches:
            raise FileNotFoundError(f"no such file, or none that ends in {', '.join(SUFFIXES)}: {name}")
        found |= dict.fromkeys(matches)
    return [*found]


def _find_here(name: str) -> list[str]:
    path = Path(name).expanduser()
    if path.is_file():
        if not _supported(path):
            raise ValueError(f"{path}: unknown kind of file; expected one that ends in {', '.join(SUFFIXES)}")
        return [str(path)]
    if path.is_dir():
        inside = (member for member in path.rglob("*") if member.is_file() and _supported(member))
        matches = [m for m in inside if not any(part.startswith(".") for part in m.relative_to(path).parts)]
    else:
        matches = [m for m in map(Path, glob.glob(str(path), recursive=True)) if m.is_file() and _supported(m)]
    return [str(match) for match in sorted(matches)]


def _supported(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _text_documents(path: Path, name: str, separator: str | None, errors: str) -> Iterator[Document]:
    """UTF-8 never contains one character's bytes inside another's, so bytes can be split before they are decoded."""
    mark = (separator or "").encode()
    pending, searched, line, number = bytearray(), 0, 1, 0
    for block in _with_plain_newlines(path, name):
        pending += block
        while mark and (end := pending.find(mark, searched)) >= 0:
            yield _text_document(name, bytes(pending[:end]), line, number, errors)
            line += pending.count(b"\n", 0, end + len(mark))
            del pending[: end + len(mark)]
            searched, number = 0, number + 1
        searched = max(0, len(pending) - len(mark) + 1)
    yield _text_document(name, bytes(pending), line, number, errors)


def _text_document(name: str, data: bytes, line: int, number: int, errors: str) -> Document:
    if number == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    return Document(_decode(data, errors, name, line), f"{name}#{number}", "files")


def _with_plain_newlines(path: Path, name: str) -> Iterator[bytes]:
    """The file's bytes in blocks, \\r\\n as \\n."""
    held = b""
    for block in compressed.blocks(path, name, _READ_BYTES):
        block = held + block
        held = b"\r" if block.endswith(b"\r") else b""  # its \n may open the next block
        yield block[: len(block) - len(held)].replace(b"\r\n", b"\n")
    yield held


def _decode(data: bytes, errors: str, name: str, line: int) -> str:
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise ValueError(
            f"{name}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file (for instance with iconv), or"
            " use errors=replace"
        ) from error


def _json_documents(path: Path, name: str, columns: Columns) -> Iterator[Document]:
    for line, data in enumerate(_lines(path, name), 1):
        if not data.strip():
            continue
        where = f"{name}:{line}"
        try:
            row = json.loads(_decode(data, columns.errors, name, line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
        for column in columns.names:
            if not isinstance(row, dict) or column not in row:
                found = f"the keys {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
                raise ValueError(f"{where}: expected an object with the key {column!r}, but got {found}")
        yield Document(columns.text([row[column] for column in columns.names], where), where, "files")


def _lines(path: Path, name: str) -> Iterator[bytes]:
    pending: list[bytes] = []
    for block in compressed.blocks(path, name, _READ_BYTES):
        first, *rest = block.split(b"\n")
        pending.append(first)
        for start in rest:
            yield b"".join(pending)
            pending = [start]
    if pending:
        yield b"".join(pending)
