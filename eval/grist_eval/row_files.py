"""Rows of a task: from a file of JSON lines, Parquet or Arrow, or a dataset by name. Bad rows are named, none is dropped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grist_eval.row_task import Row, RowTask

BAD_ROWS_SHOWN = 10
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_LINES = (".jsonl", ".json")


def read_rows(task: RowTask, path: str | Path, limit: int | None = None) -> list[Row]:
    """Rows of a local file, in the columns of the task's dataset; the first `limit` of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming file and row of every bad row (the first ten); no rows; a file of another kind.
        ImportError: a table, and pyarrow is not installed.
    """
    return _parsed(task, _rows_of_file(task, Path(path)), str(path), limit)


def hub_rows(task: RowTask, split: str, limit: int | None = None) -> list[Row]:
    """Rows of a split of the task's dataset, by `datasets.load_dataset`: from its cache, or from the network.

    Raises:
        ImportError: the package `datasets` is not installed.
        ValueError: naming every bad row (the first ten); the dataset cannot be had; no rows.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("rows by name need the package datasets: pip install 'gristmill[hub]'") from error
    path, subset = task.source.path, task.source.subset
    try:
        rows: Any = datasets.load_dataset(path, subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # no network, no such dataset or split, a broken cache
        raise ValueError(
            f"the dataset {path} ({subset or 'default'}, {split}) cannot be had: {error}; "
            "pass its rows as a file with --task-data"
        ) from error
    return _parsed(task, ((f"{path}:{split}:{at}", row) for at, row in enumerate(rows)), path, limit)


def _parsed(task: RowTask, found: Iterator[tuple[str, Any]], name: str, limit: int | None) -> list[Row]:
    rows: list[Row] = []
    faults: list[str] = []
    for where, columns in found:
        try:
            if isinstance(columns, ValueError):
                raise columns
            if not isinstance(columns, Mapping):
                raise ValueError(f"expected named columns, but got {type(columns).__name__}")
            rows.append(task.read(columns))
        except ValueError as error:
            faults.append(f"{where}: {error}")
        if limit is not None and len(rows) + len(faults) == limit:
            break
    if faults:
        more = f"\n... and {len(faults) - BAD_ROWS_SHOWN} more" if len(faults) > BAD_ROWS_SHOWN else ""
        raise ValueError(f"{len(faults)} bad row(s):\n" + "\n".join(faults[:BAD_ROWS_SHOWN]) + more)
    if not rows:
        raise ValueError(f"{name}: no rows; expected the columns {', '.join(task.columns)}")
    return rows


def _rows_of_file(task: RowTask, path: Path) -> Iterator[tuple[str, Any]]:
    """Where a row stands, and its columns, or the ValueError that says why there are none."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file of rows: {path}")
    if path.suffix in _TABLES:
        from grist_data.sources import tables

        yield from tables.rows(path, str(path), _TABLES[path.suffix], task.columns)
    elif path.suffix in _LINES:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _json(line)
    else:
        raise ValueError(f"{path}: rows are read from {', '.join([*_LINES, *_TABLES])} files")


def _json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return ValueError(f"not a line of JSON in UTF-8 ({error})")
