"""Rows of .parquet and .arrow files, a thousand at a time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_data.document import REPLACEMENT, Document, Piece
from grist_data.sources.columns import Columns

if TYPE_CHECKING:
    import pyarrow

_BATCH_ROWS = 1024
_ARROW_FILE_MAGIC = b"ARROW1"


def documents(
    path: Path, name: str, kind: str, columns: Columns, start: int = 0, stop: int | None = None
) -> Iterator[Document]:
    """One document a row, rows counted from 0. kind: 'parquet' or 'arrow'; name: what messages call the file.

    start, stop: only these groups of rows of Parquet, or batches of an Arrow file.
    Raises ValueError naming the file (and row) for a file that cannot be read, a missing column or a value that is no text.
    """
    with _reading(name, kind):
        batches = _parquet_batches if kind == "parquet" else _arrow_batches
        for row, batch in batches(path, name, columns.names, start, stop):
            values = [_values(batch.column(column), name, row, columns.errors) for column in columns.names]
            replaced = [
                _replaced(batch.column(column), of_column)
                for column, of_column in zip(columns.names, values, strict=True)
            ]
            for k, of_row in enumerate(zip(*values, strict=True)):
                yield columns.document(of_row, f"{name}:{row + k}", sum(of_column.get(k, 0) for of_column in replaced))


def rows(
    path: Path, name: str, kind: str, wanted: tuple[str, ...], start: int = 0, stop: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """File and row, and the values of those of the `wanted` columns that the file has. Arguments and errors as `documents`."""
    with _reading(name, kind):
        columns = tuple(column for column in wanted if column in _column_names(path, kind))
        if not columns:
            raise ValueError(
                f"{name}: none of the columns {', '.join(wanted)}; the columns are {', '.join(_column_names(path, kind))}"
            )
        batches = _parquet_batches if kind == "parquet" else _arrow_batches
        for first, batch in batches(path, name, columns, start, stop):
            try:
                values = batch.select(list(columns)).to_pylist()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{name}: in a row from {first} on a text is not UTF-8: write the table anew"
                ) from error
            yield from ((f"{name}:{first + k}", row) for k, row in enumerate(values))


def _column_names(path: Path, kind: str) -> list[str]:
    import pyarrow.ipc
    import pyarrow.parquet

    if kind == "parquet":
        return pyarrow.parquet.read_schema(path).names
    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
        source.seek(0)
        opened: Any = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
        return opened(source).schema.names


def pieces(path: Path, name: str, kind: str, span_bytes: int) -> Iterator[Piece]:
    """Groups of rows, or batches of an Arrow file, put together to `span_bytes` or more. Raises as `documents`."""
    with _reading(name, kind):
        start = size = 0
        sizes = _group_bytes(path) if kind == "parquet" else _batch_bytes(path)
        for number, of_group in enumerate(sizes, 1):
            size += of_group
            if size >= span_bytes and number < len(sizes):
                yield Piece(name, start, number, size)
                start, size = number, 0
        yield Piece(name, start, None, size)


@contextlib.contextmanager
def _reading(name: str, kind: str) -> Iterator[None]:
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(f"reading {name} needs pyarrow: pip install gristmill[files]") from error
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:  # a truncated stream of Arrow is an OSError
        raise ValueError(f"{name}: not a readable {kind} file: {error}") from error


def _group_bytes(path: Path) -> list[int]:
    """Of each group of rows, expanded."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        return [table.metadata.row_group(k).total_byte_size for k in range(table.num_row_groups)]


def _batch_bytes(path: Path) -> list[int]:
    """Of each batch of a file, as if all had the same; of a stream, as one: it is known when it is read."""
    import pyarrow.ipc

    size = path.stat().st_size
    with pyarrow.memory_map(str(path)) as source:
        if source.read(len(_ARROW_FILE_MAGIC)) != _ARROW_FILE_MAGIC:
            return [size]
        source.seek(0)
        n = pyarrow.ipc.open_file(source).num_record_batches
    return [size // max(n, 1)] * n


def _parquet_batches(
    path: Path, name: str, columns: tuple[str, ...], start: int, stop: int | None
) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """Number of the first row, and rows."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        _refuse_missing(columns, table.schema_arrow.names, name)
        row = sum(table.metadata.row_group(k).num_rows for k in range(start))
        groups = list(range(table.num_row_groups))[start:stop]
        wanted = list(dict.fromkeys(columns))
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, columns=wanted):
            yield row, batch
            row += batch.num_rows


def _arrow_batches(
    path: Path, name: str, columns: tuple[str, ...], start: int, stop: int | None
) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """Number of the first row, and rows, of an IPC file or an IPC stream, which is what `datasets` writes as .arrow.

    The file is mapped, so that a batch of any size stays on the disk until its rows are read.
    """
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
        opened: Any = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
        source.seek(0)
        names = opened(source).schema.names
        _refuse_missing(columns, names, name)
        # The other columns are neither read nor, in a compressed file, decompressed.
        wanted = pyarrow.ipc.IpcReadOptions(included_fields=sorted({names.index(column) for column in columns}))
        source.seek(0)
        reader = opened(source, options=wanted)
        row = 0
        for number, batch in enumerate(_all_of(reader) if is_file else reader):
            if stop is not None and number >= stop:
                return
            for first in range(0, batch.num_rows if number >= start else 0, _BATCH_ROWS):
                yield row + first, batch.slice(first, _BATCH_ROWS)
            row += batch.num_rows


def _all_of(reader: pyarrow.RecordBatchFileReader) -> Iterator[pyarrow.RecordBatch]:
    return (reader.get_batch(k) for k in range(reader.num_record_batches))


def _refuse_missing(columns: tuple[str, ...], found: list[str], name: str) -> None:
    for column in columns:
        if column not in found:
            raise ValueError(f"{name}: no column {column!r}; the columns are {', '.join(found)}")


def _values(values: pyarrow.Array, name: str, first_row: int, errors: str) -> list[Any]:
    """Python values of a column. Arrow does not check that its strings are UTF-8, so decoding them may fail here."""
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        import pyarrow

        rows = zip(itertools.count(first_row), values.cast(pyarrow.large_binary()).to_pylist(), strict=False)
        return [None if data is None else _decoded(data, f"{name}:{row}", errors) for row, data in rows]


def _replaced(column: pyarrow.Array, texts: list[Any]) -> dict[int, int]:
    """Place -> how many characters stand for bytes that are not UTF-8, where there are any."""
    marked = [k for k, text in enumerate(texts) if isinstance(text, str) and REPLACEMENT in text]
    if not marked:
        return {}
    import pyarrow

    data = column.cast(pyarrow.large_binary())
    mark = REPLACEMENT.encode()
    return {k: n for k in marked if (n := texts[k].count(REPLACEMENT) - data[k].as_py().count(mark))}


def _decoded(data: bytes, where: str, errors: str) -> str:
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte 0x{data[error.start]:02x} is not UTF-8; write the table anew, or use errors=replace"
        ) from error
