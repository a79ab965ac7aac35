"""Spans: read one by one, they give what the whole source gives, wherever they are cut; and streams are read once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_corpus import corpus_texts, write_jsonl

from grist_data import spool
from grist_data.document import Document, Piece
from grist_data.prepare_config import PrepareConfig
from grist_data.sources import SOURCES, files, gutenberg, text_files
from grist_data.spans import Reader, digest_of


def reader(tmp_path: Path, unit_bytes: int, **options) -> Reader:
    config = PrepareConfig(source="files", **options)
    return Reader("files", config.source_options(), unit_bytes, tmp_path)


def pieces_and_whole(folder: Path, span_bytes: int, **options) -> tuple[list[Piece], list[list[str]], list[str]]:
    """The pieces of a folder, the texts of each, and the texts of the source as one."""
    options = {"paths": (str(folder),), **options}
    pieces = list(files.pieces(span_bytes, **options))
    texts = [[document.text for document in files.read_piece(piece, **options)] for piece in pieces]
    return pieces, texts, [document.text for document in files.documents(**options)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "\r", "\n", "é", "|", "小", "-"]), max_size=60),
    st.sampled_from(["|", "\n", "a\n", "-|", "\n\n", "|-|", "aa", "\r\n"]),
    st.integers(1, 20),
)
def test_text_is_cut_where_documents_end(tmp_path_factory, characters, separator, span_bytes):
    folder = tmp_path_factory.mktemp("cut")
    (folder / "a.txt").write_bytes("".join(characters).encode())
    pieces, texts, whole = pieces_and_whole(folder, span_bytes, separator=separator)
    assert [text for of_piece in texts for text in of_piece] == whole
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    assert sum(piece.size for piece in pieces) == os.path.getsize(folder / "a.txt")
    if separator in ("\n\n", "|-|", "aa", "\r\n"):
        assert len(pieces) == 1  # what such a separator divides depends on what is before


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=8), max_size=20), st.integers(1, 60), st.booleans())
def test_lines_are_cut_where_they_end(tmp_path_factory, rows, span_bytes, ended):
    folder = tmp_path_factory.mktemp("cut")
    lines = [json.dumps({"text": row.encode("utf-8", "replace").decode()}) for row in rows]
    (folder / "a.jsonl").write_text("\n".join(lines) + ("\n" if ended else ""), encoding="utf-8")
    pieces, texts, whole = pieces_and_whole(folder, span_bytes)
    assert [text for of_piece in texts for text in of_piece] == whole
    assert sum(piece.size for piece in pieces) == os.path.getsize(folder / "a.jsonl")
    assert all(piece.size >= span_bytes for piece in pieces[:-1])


def test_a_large_file_has_many_pieces(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", corpus_texts(60))
    pieces, texts, _ = pieces_and_whole(tmp_path, 3000)
    assert len(pieces) > 5
    assert all(texts)


def test_messages_of_a_later_piece(tmp_path):
    lines = [json.dumps({"text": "grain"})] * 9 + ["{broken", json.dumps({"text": "mill"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    begin = 5 * (len(lines[0]) + 1)
    piece = next(piece for piece in files.pieces(begin - 1, (str(tmp_path),)) if piece.start)
    assert piece.start == begin
    with pytest.raises(ValueError, match=rf"a.jsonl:5 after byte {begin}: not valid JSON"):
        list(files.read_piece(piece, (str(tmp_path),)))


def test_a_mark_is_dropped_at_the_beginning_only(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfgrain|\xef\xbb\xbfmill")
    _, texts, whole = pieces_and_whole(tmp_path, 6, separator="|")
    assert texts == [["grain"], ["\ufeffmill"]]
    assert whole == ["grain", "\ufeffmill"]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
@pytest.mark.parametrize("span_bytes", [1, 4000, 10**9])
def test_tables_are_cut_at_their_groups_of_rows(tmp_path, kind, span_bytes):
    pyarrow = pytest.importorskip("pyarrow")
    parquet, ipc = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow.ipc")
    texts = corpus_texts(40)
    table = pyarrow.table({"text": texts, "n": list(range(40))})
    if kind == "parquet":
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    else:
        new = ipc.new_file if kind == "arrow" else ipc.new_stream
        with new(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    pieces, found, whole = pieces_and_whole(tmp_path, span_bytes)
    assert [text for of_piece in found for text in of_piece] == whole == texts
    assert len(pieces) == (
        6 if span_bytes == 1 and kind != "stream" else 1 if span_bytes > 10**6 or kind == "stream" else len(pieces)
    )
    ids = [document.id for piece in pieces for document in files.read_piece(piece, (str(tmp_path),))]
    assert ids == [document.id for document in files.documents((str(tmp_path),))]


def test_compressed_files_are_whole(tmp_path):
    import gzip

    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(write_jsonl(tmp_path / "b.jsonl", corpus_texts(9)).read_bytes())
    )
    pieces, texts, whole = pieces_and_whole(tmp_path, 1)
    assert [piece.stop for piece in pieces if piece.name.endswith(".gz")] == [None]
    assert [text for of_piece in texts for text in of_piece] == whole == corpus_texts(9) * 2


def test_small_files_share_a_span(tmp_path):
    for k in range(20):
        (tmp_path / f"{k:02d}.txt").write_text("grain " * 20)
    spans = reader(tmp_path, 60, paths=(str(tmp_path),)).spans()
    assert [len(span.pieces) for span in spans] == [2] * 10
    assert str(spans[1]) == f"{tmp_path}/02.txt and 1 more"
    assert digest_of(spans) == digest_of(reader(tmp_path, 60, paths=(str(tmp_path),)).spans())
    assert digest_of(spans) != digest_of(reader(tmp_path, 120, paths=(str(tmp_path),)).spans())
    (tmp_path / "07.txt").write_text("grain " * 21)
    assert digest_of(spans) != digest_of(reader(tmp_path, 60, paths=(str(tmp_path),)).spans())


def test_replaced_characters_are_counted_by_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve \ufffd|bad \xff\xfe|".encode("latin-1", "ignore") + "\ufffd".encode())
    (tmp_path / "b.jsonl").write_bytes(
        b'{"text": "half \\ud800 pair"}\n{"text": "bad \xff"}\n{"text": "\xef\xbf\xbd"}\n'
    )
    documents = files.documents((str(tmp_path),), separator="|", errors="replace")
    assert [(document.text, document.replaced) for document in documents] == [
        ("na\ufffdve ", 1),
        ("bad \ufffd\ufffd", 2),
        ("\ufffd", 0),
        ("half \ufffd pair", 1),
        ("bad \ufffd", 1),
        ("\ufffd", 0),
    ]


def test_replaced_characters_of_tables(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = pyarrow.array([b"grain", b"bad \xff", "\ufffd".encode()], pyarrow.binary())
    column = pyarrow.StringArray.from_buffers(3, data.buffers()[1], data.buffers()[2])
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    found = [(d.text, d.replaced) for d in files.documents((str(tmp_path),), errors="replace")]
    assert found == [("grain", 0), ("bad \ufffd", 1), ("\ufffd", 0)]


def test_books_are_pieces(tmp_path):
    for book in (1, 2):
        (tmp_path / f"pg{book}.txt").write_text(
            f"*** START OF THE PROJECT GUTENBERG EBOOK X ***\nbook {book}\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\n"
        )
    options = {"books": (1, 2), "cache_dir": str(tmp_path)}
    found = [d.text for piece in gutenberg.pieces(10, **options) for d in gutenberg.read_piece(piece, **options)]
    assert found == [d.text for d in gutenberg.documents(**options)] == ["book 1\n", "book 2\n"]


def test_a_source_without_pieces_is_one_span(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "mine", lambda: iter([Document("grain", "1")]))
    mine = Reader("mine", {}, 10, tmp_path)
    (span,) = mine.spans()
    assert str(span) == "the source"
    assert [d.text for d in mine.documents(span)] == ["grain"]
    assert mine.facts() == {}


class Stream:
    """A stream that breaks, and counts what was asked of it."""

    def __init__(self, texts: list[str], breaks_at: int | None = None) -> None:
        self.texts, self.breaks_at, self.read = texts, breaks_at, []

    def __call__(self, state):
        for number in range(0 if state is None else state["next"], len(self.texts)):
            if number == self.breaks_at:
                raise ConnectionError("the line is down")
            self.read.append(number)
            yield Document(self.texts[number], str(number), "stream", number % 2), lambda at=number: {"next": at + 1}


@pytest.mark.parametrize("breaks_at", [0, 1, 7, 19])
def test_a_stream_is_stored_once(tmp_path, breaks_at):
    texts = corpus_texts(20)
    broken = Stream(texts, breaks_at)
    with pytest.raises(ConnectionError):
        spool.fill(tmp_path / "spool", broken, 2000)
    with pytest.raises(ValueError, match="does not hold the whole stream yet"):
        spool.pieces(tmp_path / "spool")
    stored = sum(1 for file in (tmp_path / "spool").glob("*.jsonl") for _ in file.open())
    again = Stream(texts)
    spool.fill(tmp_path / "spool", again, 2000)
    assert again.read == list(range(stored, 20))
    pieces = spool.pieces(tmp_path / "spool")
    assert len(pieces) > 3
    found = [document for piece in pieces for document in spool.read(tmp_path / "spool", piece)]
    assert found == [Document(text, str(k), "stream", k % 2) for k, text in enumerate(texts)]
    spool.fill(tmp_path / "spool", Stream(texts, 0), 2000)  # all there: the stream is not asked


def test_a_stream_killed_before_its_end_was_marked(tmp_path):
    spool.fill(tmp_path / "spool", Stream(["a", "b", "c"]), 10**6)
    (tmp_path / "spool" / "done.json").unlink()
    spool.fill(tmp_path / "spool", Stream(["a", "b", "c"]), 10**6)
    assert [d.text for piece in spool.pieces(tmp_path / "spool") for d in spool.read(tmp_path / "spool", piece)] == [
        "a",
        "b",
        "c",
    ]


def test_parts_name_their_place():
    part = text_files.Part(Path("a"), "a", 100, 200)
    assert part.line(3) == "a:3 after byte 100"
    assert text_files.Part(Path("a"), "a").line(3) == "a:3"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside, max_size=3),
    max_leaves=6,
)
AWKWARD_LINES = [
    b'{"text": "\\ud83c\\udf3e \\u0000"}',
    b'{"text": "half \\ud800"}',
    b'{"text": "bad \xff"}',
    b'{"text": "a", "text": "b"}',
    b' {"text": "a"}\r',
    b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": "a", "n": NaN}',
    b'{"text": "tab\tinside"}',
    b'{"text": "a"} trailing',
    b'{"text": ' + b"[" * 1500 + b"]" * 1500 + b"}",
    b"null",
    b'"text"',
    b"[1]",
]


def read_line(folder: Path, line: bytes, errors: str) -> object:
    (folder / "a.jsonl").write_bytes(line + b"\n")
    try:
        return list(files.documents((str(folder / "a.jsonl"),), errors=errors))
    except (ValueError, RecursionError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_the_quick_parser_changes_nothing(tmp_path, errors, monkeypatch):
    pytest.importorskip("orjson")

    def check(line: bytes) -> None:
        with monkeypatch.context() as patch:
            quick = read_line(tmp_path, line, errors)
            patch.setitem(sys.modules, "orjson", None)
            assert read_line(tmp_path, line, errors) == quick

    for line in AWKWARD_LINES:
        check(line)

    @settings(max_examples=200, deadline=None)
    @given(st.dictionaries(st.sampled_from(["text", "a", ""]), JSON_VALUES, max_size=3), st.booleans())
    def check_any(row, ascii_only):
        check(json.dumps(row, ensure_ascii=ascii_only).encode("utf-8", "replace").replace(b"\n", b" "))

    check_any()
