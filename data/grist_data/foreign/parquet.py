"""Parquet with a column of lists of ids, as data for Llama-like models is packed: a row is a document or a packed window."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grist_data.foreign.token_file import PIECE_TOKENS


class ParquetFile:
    """One .parquet file; rows are documents unless a marker is given. Only the batch being read is in memory."""

    has_documents = True

    def __init__(self, path: Path, column: str = "input_ids") -> None:
        """Raises ValueError for a file that is no Parquet, or without a column of lists of whole numbers of that name."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(f"reading {path} needs pyarrow: pip install gristmill[hub]") from error
        if not path.is_file():
            raise FileNotFoundError(f"no token file at {path}")
        try:
            self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is no Parquet file, or truncated: {error}") from error
        self.path, self._column = path, column
        self.dtype = np.dtype(_value_type(self._file.schema_arrow, column, path).to_pandas_dtype())
        metadata = self._file.metadata
        n_values = sum(_values(metadata.row_group(k), column) for k in range(metadata.num_row_groups))
        self._batch_rows = max(1, PIECE_TOKENS * metadata.num_rows // max(1, n_values))
        # Row groups count empty lists among their values, so the ids are counted by reading them once.
        counts = [sum(len(ids) for ids, _ in self._rows(k)) for k in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).tolist()
        self.n_tokens: int = self._starts[-1]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for group in range(len(self._starts) - 1):
            at = self._starts[group]
            if self._starts[group + 1] <= start or at >= stop:
                continue
            for ids, ends in self._rows(group):
                low, high = max(start, at) - at, min(stop, at + len(ids)) - at
                if low < high:
                    yield ids[low:high], ends[(ends > low) & (ends <= high)] + at
                at += len(ids)

    def where(self, token: int) -> str:
        at = row = 0
        for group in range(len(self._starts) - 1):
            for ids, ends in self._rows(group):
                if at + len(ids) > token:
                    return f"{self.path}, row {row + int(np.searchsorted(ends, token - at, side='right')):,}"
                at, row = at + len(ids), row + len(ends)
        raise IndexError(f"{self.path} has {self.n_tokens:,} ids, no id {token:,}")

    def _rows(self, group: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of rows: their ids, and where each row ends among them (equal ends are empty rows)."""
        for batch in self._file.iter_batches(self._batch_rows, row_groups=[group], columns=[self._column]):
            lists = batch.column(0)
            values = lists.flatten()
            if values.null_count:
                raise ValueError(f"{self.path}: column {self._column!r} has ids that are null, in row group {group}")
            lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
            yield values.to_numpy(zero_copy_only=False), np.cumsum(lengths, dtype=np.int64)


def read(path: Path, column: str = "input_ids") -> ParquetFile:
    return ParquetFile(path, column)


def _value_type(schema: Any, column: str, path: Path) -> Any:
    import pyarrow.types as types

    if column not in schema.names:
        raise ValueError(f"{path} has no column {column!r}; it has {', '.join(schema.names)}: name one of lists of ids")
    kind = schema.field(column).type
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not is_list or not types.is_integer(kind.value_type):
        raise ValueError(f"{path}: column {column!r} must hold lists of whole numbers, but it holds {kind}")
    return kind.value_type


def _values(row_group: Any, column: str) -> int:
    """Values that a row group says it has for the column; a list column of name c is stored as c.list.element."""
    columns = [row_group.column(k) for k in range(row_group.num_columns)]
    return sum(each.num_values for each in columns if each.path_in_schema.split(".")[0] == column)
