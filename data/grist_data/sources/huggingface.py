"""Any dataset that `datasets.load_dataset` opens: by name on the hub, or a local directory or file."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grist_data.document import Document, Piece

_BUILDER_OF = {".json": "json", ".jsonl": "json", ".gz": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
# Fixed by their number: the bytes of rows are known for some kinds of storage only.
_PIECE_ROWS = 1 << 14


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
    streaming: read over the network without storing; `prepare` does so once, and keeps the texts while it works.
    revision: commit or tag, which fixes what is read. cache_dir: where `datasets` stores.
    Raises ImportError without the package `datasets`, ValueError for a missing column or a row that is not text.
    """
    rows = _texts(_opened(name, subset, split, streaming, revision, cache_dir), name, text_column)
    return _documents(itertools.islice(rows, max_documents), 0, name, split, text_column)


def pieces(
    span_bytes: int,
    name: str,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    cache_dir: str | None = None,
    max_documents: int | None = None,
    **others: object,
) -> Iterator[Piece]:
    """Ranges of rows, of a dataset that is stored; each as large as a span. others: options that do not matter here."""
    _open_once.cache_clear()  # whoever lists the pieces anew sees a file that has changed
    n = len(_open_once(name, subset, split, False, revision, cache_dir))
    n = n if max_documents is None else min(n, max_documents)
    for start in range(0, n, _PIECE_ROWS):
        stop = min(start + _PIECE_ROWS, n)
        yield Piece(f"{name}:{split}", start, stop, -(-(stop - start) * span_bytes // _PIECE_ROWS))


def read_piece(
    piece: Piece,
    name: str,
    subset: str | None = None,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    revision: str | None = None,
    cache_dir: str | None = None,
    max_documents: int | None = None,
) -> Iterator[Document]:
    """Rows [start, stop). Options and errors are those of `documents`."""
    rows = _open_once(name, subset, split, False, revision, cache_dir)
    stop = len(rows) if piece.stop is None else piece.stop
    chosen = _texts(rows.select(range(piece.start, stop)), name, text_column)
    return _documents(chosen, piece.start, name, split, text_column)


def stream(
    state: Any,
    name: str,
    subset: str | None = None,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = True,
    revision: str | None = None,
    cache_dir: str | None = None,
    max_documents: int | None = None,
) -> Iterator[tuple[Document, Callable[[], Any]]]:
    """The documents from a state on (None: from the first), each with what gives the state after it. See spool.py."""
    rows = _texts(_opened(name, subset, split, True, revision, cache_dir), name, text_column)
    first = 0
    if state is not None:
        first = state["next"]
        rows.load_state_dict(state["rows"])
    found = _documents(rows, first, name, split, text_column)
    for number, document in enumerate(found, first + 1):
        yield document, functools.partial(_state, rows, number)
        if number == max_documents:
            return


def _state(rows: Any, number: int) -> dict[str, Any]:
    return {"rows": rows.state_dict(), "next": number}


def facts(name: str, revision: str | None = None, streaming: bool = False, **others: object) -> dict[str, Any]:
    """`revision`: the commit on the hub that was read, where `datasets` or the hub says which; nothing for local data."""
    if Path(name).expanduser().exists():
        return {}
    if streaming:
        import huggingface_hub

        return {"revision": huggingface_hub.HfApi().dataset_info(name, revision=revision).sha}
    options = {key: value for key, value in others.items() if key in ("subset", "split", "cache_dir")}
    rows = _open_once(
        name, options.get("subset"), options.get("split", "train"), False, revision, options.get("cache_dir")
    )
    return _revision(rows.info.download_checksums or {})


def _revision(checksums: dict[str, Any]) -> dict[str, str]:
    """Of files such as hf://datasets/NAME@COMMIT/FILE."""
    commits = {found[1] for file in checksums if (found := re.search(r"@([0-9a-f]{40})/", file))}
    return {"revision": ", ".join(sorted(commits))} if commits else {}


def _texts(rows: Any, name: str, text_column: str) -> Any:
    """The column alone, where the columns are known."""
    columns = rows.column_names
    if columns is None:
        return rows
    if text_column not in columns:
        raise ValueError(f"dataset {name} has no column {text_column!r}; its columns are {', '.join(columns)}")
    return rows.select_columns([text_column])


def _documents(rows: Any, first: int, name: str, split: str, text_column: str) -> Iterator[Document]:
    for number, row in enumerate(rows, first):
        text = row.get(text_column)
        if not isinstance(text, str):
            raise ValueError(f"{name}:{number}: expected a text in {text_column!r}, but got {text!r:.60}")
        yield Document(text, f"{name}:{split}:{number}", "huggingface")


@functools.lru_cache(maxsize=1)
def _open_once(*options: Any) -> Any:
    return _opened(*options)


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
