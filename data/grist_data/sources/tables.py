"""Rows of .parquet and .arrow files, a thousand at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_data.document import Document
from grist_data.sources.columns import Columns

if TYPE_CHECKING:
    import pyarrow

_BATCH_ROWS = 1024
_ARROW_FILE_MAGIC = b"ARROW1"


def documents(path: Path, name: str, kind: str, columns: Columns) -> Iterator[Document]:
    """One document a row, rows counted from 0. kind: 'parquet' or 'arrow'; name: what messages call the file.

    Raises ValueError naming the file (and row) for a file that cannot be read, a missing column or a value that is no text.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(f"reading {name} needs pyarrow: pip install gristmill[files]") from error
    batches = _parquet_batches if kind == "parquet" else _arrow_batches
    row = 0
    try:
        for batch in batches(path, name, columns.names):
            values = [_values(batch.column(column), name, row, columns.errors) for column in columns.names]
            for of_row in zip(*values, strict=True):
                yield Document(columns.text(of_row, f"{name}:{row}"), f"{name}:{row}", "files")
                row += 1
    except (pyarrow.ArrowException, OSError) as error:  # a truncated stream of Arrow is an OSError
        raise ValueError(f"{name}: not a readable {kind} file: {error}") from error


def _parquet_batches(path: Path, name: str, columns: tuple[str, ...]) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        _refuse_missing(columns, table.schema_arrow.names, name)
        yield from table.iter_batches(batch_size=_BATCH_ROWS, columns=list(dict.fromkeys(columns)))


def _arrow_batches(path: Path, name: str, columns: tuple[str, ...]) -> Iterator[pyarrow.RecordBatch]:
    """Of an IPC file or an IPC stream, which is what `datasets` writes under the name .arrow.

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
        batches = (reader.get_batch(k) for k in range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.slice(start, _BATCH_ROWS)


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


def _decoded(data: bytes, where: str, errors: str) -> str:
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte 0x{data[error.start]:02x} is not UTF-8; write the table anew, or use errors=replace"
        ) from error
