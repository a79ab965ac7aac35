"""Local files: .txt, .jsonl and .parquet, the first two also as .gz; single files, directories and globs."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from grist_data.document import Document

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
_READ_BYTES = 1 << 20


def documents(
    paths: tuple[str, ...],
    text_column: str = "text",
    separator: str | None = None,
    errors: str = "strict",
) -> Iterator[Document]:
    r"""One document a text file, a line of .jsonl, or a row of .parquet.

    paths: files, directories (searched through, hidden names left out) or globs ('books/**/*.txt').
    text_column: key or column that holds the text.
    separator: text that divides a .txt file into documents, such as '<|endoftext|>' or '\n\n\n'; it is dropped.
    errors: 'strict' refuses what is not UTF-8, 'replace' puts U+FFFD in its place.
    In .txt files a leading byte order mark is dropped and \r\n becomes \n.
    Raises FileNotFoundError for a path that matches nothing, ValueError naming file and line for malformed content.
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors must be 'strict' or 'replace', but got {errors!r}")
    if separator == "":
        raise ValueError("separator is empty: give the text that stands between documents, or leave it out")
    for file in find(paths):
        kind = file.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
        if kind == "txt":
            yield from _text_documents(file, separator, errors)
        elif kind == "jsonl":
            yield from _json_documents(file, text_column, errors)
        else:
            yield from _parquet_documents(file, text_column)


def find(paths: tuple[str, ...]) -> list[Path]:
    """Every file that the paths name, each once, in an order that does not depend on the file system."""
    if not paths:
        raise ValueError("the files source needs paths: files, directories or globs")
    found: dict[Path, None] = {}
    for name in paths:
        path = Path(name).expanduser()
        if path.is_file():
            if not _supported(path):
                raise ValueError(f"{path}: unknown kind of file; expected one that ends in {', '.join(SUFFIXES)}")
            matches = [path]
        elif path.is_dir():
            inside = (member for member in path.rglob("*") if member.is_file() and _supported(member))
            matches = [m for m in inside if not any(part.startswith(".") for part in m.relative_to(path).parts)]
        else:
            matches = [m for m in map(Path, glob.glob(str(path), recursive=True)) if m.is_file() and _supported(m)]
        if not matches:
            raise FileNotFoundError(f"no such file, or none that ends in {', '.join(SUFFIXES)}: {name}")
        found |= dict.fromkeys(sorted(matches))
    return [*found]


def _supported(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _text_documents(file: Path, separator: str | None, errors: str) -> Iterator[Document]:
    """UTF-8 never contains one character's bytes inside another's, so bytes can be split before they are decoded."""
    mark = (separator or "").encode()
    pending, searched, line, number = bytearray(), 0, 1, 0
    for block in _with_plain_newlines(file):
        pending += block
        while mark and (end := pending.find(mark, searched)) >= 0:
            yield _text_document(file, bytes(pending[:end]), line, number, errors)
            line += pending.count(b"\n", 0, end + len(mark))
            del pending[: end + len(mark)]
            searched, number = 0, number + 1
        searched = max(0, len(pending) - len(mark) + 1)
    yield _text_document(file, bytes(pending), line, number, errors)


def _text_document(file: Path, data: bytes, line: int, number: int, errors: str) -> Document:
    if number == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    return Document(_decode(data, errors, file, line), f"{file}#{number}", "files")


def _with_plain_newlines(file: Path) -> Iterator[bytes]:
    """The file's bytes in blocks, \\r\\n as \\n."""
    held = b""
    with _opened(file) as stream:
        while block := _read(file, stream):
            block = held + block
            held = b"\r" if block.endswith(b"\r") else b""  # its \n may open the next block
            yield block[: len(block) - len(held)].replace(b"\r\n", b"\n")
    yield held


def _decode(data: bytes, errors: str, file: Path, line: int) -> str:
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise ValueError(
            f"{file}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file (for instance with iconv), or"
            " use errors=replace"
        ) from error


def _json_documents(file: Path, text_column: str, errors: str) -> Iterator[Document]:
    for line, data in enumerate(_lines(file), 1):
        if not data.strip():
            continue
        try:
            row = json.loads(_decode(data, errors, file, line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{line}: not valid JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict) or text_column not in row:
            found = f"the keys {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{file}:{line}: expected an object with the key {text_column!r}, but got {found}")
        yield Document(_checked(row[text_column], errors, f"{file}:{line}"), f"{file}:{line}", "files")


def _lines(file: Path) -> Iterator[bytes]:
    pending: list[bytes] = []
    with _opened(file) as stream:
        while block := _read(file, stream):
            first, *rest = block.split(b"\n")
            pending.append(first)
            for start in rest:
                yield b"".join(pending)
                pending = [start]
    if pending:
        yield b"".join(pending)


def _parquet_documents(file: Path, text_column: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {file} needs pyarrow: pip install gristmill[hub]") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if text_column not in columns:
                raise ValueError(f"{file}: no column {text_column!r}; the columns are {', '.join(columns)}")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_column]):
                for text in batch.column(0).to_pylist():
                    yield Document(_checked(text, "strict", f"{file}:{row}"), f"{file}:{row}", "files")
                    row += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: not a readable parquet file: {error}") from error


def _checked(text: object, errors: str, where: str) -> str:
    """A string that UTF-8 can hold: JSON's \\ud800 escapes make strings that it cannot."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected a text, but got {type(text).__name__} ({text!r:.60})")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise ValueError(f"{where}: {text[error.start]!r} is half of a UTF-16 pair; use errors=replace") from error
    return text


def _opened(file: Path) -> BinaryIO:
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else open(file, "rb")  # type: ignore[return-value]


def _read(file: Path, stream: BinaryIO) -> bytes:
    try:
        return stream.read(_READ_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: the gzip stream is damaged or cut short: {error}") from error
