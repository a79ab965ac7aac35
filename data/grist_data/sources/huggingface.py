"""Any dataset that `datasets.load_dataset` opens: by name on the hub, or a local directory or file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grist_data.document import Document

_BUILDER_OF = {".json": "json", ".jsonl": "json", ".gz": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def documents(
    name: str,
    subset: str | None = None,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    revision: str | None = None,
    cache_dir: str | None = None,
    max_documents: int | None = None,
) -> Iterator[Document]:
    """One document a row.

    name: a dataset on the hub, a local directory (of data files, or of `save_to_disk`), or a local file.
    subset: the dataset's configuration, where it has several. split: 'train', or a slice such as 'train[:1%]'.
    streaming: read over the network without storing; every pass of `prepare` reads again, so give `max_documents`.
    revision: commit or tag, which fixes what is read. cache_dir: where `datasets` stores.
    Raises ImportError without the package `datasets`, ValueError for a missing column or a row that is not text.
    """
    rows = _opened(name, subset, split, streaming, revision, cache_dir)
    columns = rows.column_names
    if columns is not None and text_column not in columns:
        raise ValueError(f"dataset {name} has no column {text_column!r}; its columns are {', '.join(columns)}")
    for number, row in enumerate(itertools.islice(rows, max_documents)):
        text = row.get(text_column)
        if not isinstance(text, str):
            raise ValueError(f"{name}:{number}: expected a text in {text_column!r}, but got {text!r:.60}")
        yield Document(text, f"{name}:{split}:{number}", "huggingface")


def _opened(
    name: str, subset: str | None, split: str, streaming: bool, revision: str | None, cache_dir: str | None
) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("the huggingface source needs the package datasets: pip install gristmill[hub]") from error
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in _BUILDER_OF:
            raise ValueError(f"{name}: unknown kind of file; expected one that ends in {', '.join(_BUILDER_OF)}")
        builder = _BUILDER_OF[path.suffix]
        return datasets.load_dataset(
            builder, data_files=str(path), split=split, streaming=streaming, cache_dir=cache_dir
        )
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.Dataset):
            return saved
        if split not in saved:
            raise ValueError(f"{name} has no split {split!r}; its splits are {', '.join(map(str, saved))}")
        return saved[split]
    return datasets.load_dataset(name, subset, split=split, streaming=streaming, revision=revision, cache_dir=cache_dir)
