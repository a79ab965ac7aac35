"""Conversations in files: chat, ShareGPT and Alpaca rows (conversation.py) of .jsonl, .parquet and .arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from grist_data.conversation import COLUMNS, conversation_of
from grist_data.document import Document, Piece
from grist_data.sources import compressed, files, remote, tables, text_files


def documents(paths: tuple[str, ...], errors: str = "strict", cache_dir: str | None = None) -> Iterator[Document]:
    """One conversation a row; files may hold rows of several kinds.

    paths: files, directories (searched through) or globs, or addresses of such, as for the files source; .txt files among them
        are refused.
    errors: 'strict' refuses what is not UTF-8, 'replace' puts U+FFFD in its place.
    cache_dir: where copies of files at addresses are kept (default: ~/.cache/gristmill/files).
    Raises FileNotFoundError for a path that matches nothing, ValueError naming file and line or row for what is no
    conversation, ImportError naming the package that a kind of file or address needs.
    """
    for name in files.find(paths):
        yield from read_piece(Piece(name), paths, errors, cache_dir)


def pieces(span_bytes: int, paths: tuple[str, ...], **others: object) -> Iterator[Piece]:
    """Files, and parts of large ones, as the files source has them. others: options that do not matter here."""
    return files.pieces(span_bytes, paths)


def read_piece(
    piece: Piece, paths: tuple[str, ...], errors: str = "strict", cache_dir: str | None = None
) -> Iterator[Document]:
    """The conversations of one of the `pieces`. Options and errors are those of `documents`."""
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors must be 'strict' or 'replace', but got {errors!r}")
    name = piece.name
    path = remote.local_copy(name, cache_dir) if remote.is_remote(name) else Path(name)
    kind = compressed.kind_of(path.name)
    if kind == "txt":
        raise ValueError(f"{name}: a .txt file holds no conversations; give .jsonl, .parquet or .arrow files")
    if kind == "jsonl":
        part = text_files.Part(path, name, piece.start, piece.stop)
        for where, row, replaced in text_files.json_rows(part, errors):
            yield conversation_of(row, where, errors, replaced)
    else:
        for where, row in tables.rows(path, name, kind, COLUMNS, piece.start, piece.stop):
            yield conversation_of(row, where, errors)
