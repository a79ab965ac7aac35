"""Files of text: .txt, .jsonl, .parquet and .arrow, here or at an address; single files, directories and globs."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

from grist_data.document import Document, Piece
from grist_data.sources import compressed, remote, tables, text_files
from grist_data.sources.columns import columns_of

SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow")


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
    for name in find(paths):
        yield from read_piece(Piece(name), paths, text_column, separator, errors, template, cache_dir)


def pieces(span_bytes: int, paths: tuple[str, ...], separator: str | None = None, **others: object) -> Iterator[Piece]:
    """Files, and of large ones on this machine the parts that can be read by themselves, of `span_bytes` or more.

    Divided are plain .jsonl files at the ends of lines, plain .txt files at separators that cannot overlap themselves, .parquet
    files at groups of rows and .arrow files (not streams) at their batches. others: options that do not matter here.
    """
    for name, known_bytes in _found(paths).items():
        if remote.is_remote(name):
            yield Piece(name, size=span_bytes if known_bytes is None else known_bytes)
            continue
        path = Path(name)
        suffix, size = path.suffix.lower(), path.stat().st_size
        if suffix in (".parquet", ".arrow"):
            yield from tables.pieces(path, name, suffix[1:], span_bytes)
            continue
        ends = []
        if suffix in (".jsonl", ".txt"):
            ends = text_files.cuts(path, "\n" if suffix == ".jsonl" else separator or "", span_bytes)
        starts = [0, *ends]
        for start, stop in zip(starts, [*ends, None], strict=True):
            yield Piece(name, start, stop, (size if stop is None else stop) - start)


def read_piece(
    piece: Piece,
    paths: tuple[str, ...],
    text_column: str | None = None,
    separator: str | None = None,
    errors: str = "strict",
    template: str | None = None,
    cache_dir: str | None = None,
) -> Iterator[Document]:
    """The documents of one of the `pieces`. Options and errors are those of `documents`."""
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors must be 'strict' or 'replace', but got {errors!r}")
    if separator == "":
        raise ValueError("separator is empty: give the text that stands between documents, or leave it out")
    columns = columns_of(text_column, template, errors)
    name = piece.name
    path = remote.local_copy(name, cache_dir) if remote.is_remote(name) else Path(name)
    kind = compressed.kind_of(path.name)
    part = text_files.Part(path, name, piece.start, piece.stop)
    if kind == "txt":
        if template is not None:
            raise ValueError(f"{name}: a .txt file has no columns for the template {template!r}; leave such files out")
        return text_files.text_documents(part, separator, errors)
    if kind == "jsonl":
        return text_files.json_documents(part, columns)
    return tables.documents(path, name, kind, columns, piece.start, piece.stop)


def find(paths: tuple[str, ...]) -> list[str]:
    """Every file that the paths name, each once, in an order that does not depend on the file system."""
    return [*_found(paths)]


def _found(paths: tuple[str, ...]) -> dict[str, int | None]:
    """Every file, with its bytes where it lies elsewhere and the store says so."""
    if not paths:
        raise ValueError("the files source needs paths: files, directories or globs")
    found: dict[str, int | None] = {}
    for name in paths:
        matches = remote.sizes(name, SUFFIXES) if remote.is_remote(name) else dict.fromkeys(_find_here(name))
        if not matches:
            raise FileNotFoundError(f"no such file, or none that ends in {', '.join(SUFFIXES)}: {name}")
        found |= {match: size for match, size in matches.items() if match not in found}
    return found


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
