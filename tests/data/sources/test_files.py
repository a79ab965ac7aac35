"""Local files of every kind, and errors that name file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from grist_data.sources import files, text_files


def texts(*paths: Path | str, **options) -> list[str]:
    return [document.text for document in files.documents(tuple(map(str, paths)), **options)]


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write_file


def rows(*values: str) -> str:
    return "".join(json.dumps({"id": 1, "text": value}) + "\n" for value in values)


def test_text_files(write):
    assert texts(write("a.txt", "grain\r\n小麦\n")) == ["grain\n小麦\n"]
    assert texts(write("bom.txt", b"\xef\xbb\xbfgrain")) == ["grain"]
    assert texts(write("z.txt.gz", "flour")) == ["flour"]
    assert texts(write("mac.txt", "a\rb\r")) == ["a\rb\r"]


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 5, 1 << 20])
def test_reading_in_blocks_changes_nothing(write, monkeypatch, read_bytes):
    """Block borders inside \\r\\n, inside a separator, inside a character, inside a line."""
    monkeypatch.setattr(text_files, "_READ_BYTES", read_bytes)
    text = write("a.txt", b"\xef\xbb\xbfone\r\n<|sep|>tw\xc3\xb6\r\n\r\r\n<|sep|>\r\nthree")
    assert texts(text, separator="<|sep|>") == ["one\n", "twö\n\r\n", "\nthree"]
    assert texts(text) == ["one\n<|sep|>twö\n\r\n<|sep|>\nthree"]
    assert texts(write("a.jsonl", rows("eins", "zwö") + "\n" + rows("drei")[:-1])) == ["eins", "zwö", "drei"]


def test_json_lines(write):
    assert texts(write("a.jsonl", rows("a", "b"))) == ["a", "b"]
    assert texts(write("a.jsonl.gz", rows("a", "b"))) == ["a", "b"]
    assert texts(write("b.jsonl", '{"body": "x"}\n'), text_column="body") == ["x"]
    # U+2028 is a line end for str.splitlines, but not in a JSON lines file.
    assert texts(write("c.jsonl", '{"text": "a\u2028b\x85c"}\n')) == ["a\u2028b\x85c"]


def test_parquet(write, tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a", "小麦"] * 1500, "n": list(range(3000))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    assert texts(tmp_path / "a.parquet") == ["a", "小麦"] * 1500
    with pytest.raises(ValueError, match=r"a.parquet: no column 'body'; the columns are text, n"):
        texts(tmp_path / "a.parquet", text_column="body")
    with pytest.raises(ValueError, match=r"a.parquet:0: expected a text, but got int \(0\)"):
        texts(tmp_path / "a.parquet", text_column="n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet:1: expected a text, but got NoneType"):
        texts(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"c.parquet: not a readable parquet file"):
        texts(write("c.parquet", b"PAR1 no"))


def test_directories_globs_and_order(write, tmp_path):
    for name in ("d/b.txt", "d/a.txt", "d/sub/c.jsonl", "d/.hidden/x.txt", "d/.x.txt", "d/notes.md"):
        write(name, rows(name) if name.endswith("jsonl") else name)
    assert texts(tmp_path / "d") == ["d/a.txt", "d/b.txt", "d/sub/c.jsonl"]
    assert texts(tmp_path / "d" / "*.txt") == ["d/a.txt", "d/b.txt"]
    assert texts(str(tmp_path / "d") + "/**/*.jsonl") == ["d/sub/c.jsonl"]
    assert texts(tmp_path / "d" / "b.txt", tmp_path / "d") == ["d/b.txt", "d/a.txt", "d/sub/c.jsonl"]
    ids = [document.id for document in files.documents((str(tmp_path / "d"),))]
    assert ids[0].endswith("d/a.txt#0")
    assert ids[2].endswith("c.jsonl:1")


def test_nothing_found(write, tmp_path):
    write("d/notes.md", "x")
    for path in (tmp_path / "absent.txt", tmp_path / "d", tmp_path / "*.txt"):
        with pytest.raises(FileNotFoundError, match=r"no such file, or none that ends in \.txt"):
            texts(path)
    with pytest.raises(ValueError, match=r"notes.md: unknown kind of file; expected one that ends in \.txt"):
        texts(tmp_path / "d" / "notes.md")
    with pytest.raises(ValueError, match="needs paths"):
        texts()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"a.jsonl:2: not valid JSON: Expecting property name .* at column 2"),
        ("[1]", r"a.jsonl:2: expected an object with the key 'text', but got list"),
        ('{"body": "x", "n": 1}', r"a.jsonl:2: expected an object with the key 'text', but got the keys body, n"),
        ('{"text": 3}', r"a.jsonl:2: expected a text, but got int \(3\)"),
        ('{"text": null}', r"a.jsonl:2: expected a text, but got NoneType"),
        ('{"text": "\\ud800"}', r"a.jsonl:2: '.ud800' is half of a UTF-16 pair; use errors=replace"),
    ],
)
def test_malformed_rows_are_named(write, line, message):
    file = write("a.jsonl", rows("fine") + line + "\n")
    with pytest.raises(ValueError, match=message):
        texts(file)


def test_bytes_that_are_not_utf8(write):
    text = write("a.txt", b"one\ntwo\n<s>three\nfo\xffur\n")
    with pytest.raises(ValueError, match=r"a.txt:4: byte 0xff is not UTF-8; .*errors=replace"):
        texts(text)
    with pytest.raises(ValueError, match=r"a.txt:4: byte 0xff"):
        texts(text, separator="<s>")
    assert texts(text, errors="replace") == ["one\ntwo\n<s>three\nfo\ufffdur\n"]
    line = write("a.jsonl", rows("fine").encode() + b'{"text": "\xff \\ud83d"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2: byte 0xff"):
        texts(line)
    assert texts(line, errors="replace") == ["fine", "\ufffd \ufffd"]


def test_damaged_gzip(write, tmp_path):
    whole = write("a.jsonl.gz", rows("a" * 1000)).read_bytes()
    for name, data in [("cut", whole[:-10]), ("not", b"plain text"), ("bent", whole[:20] + b"\xff\xff" + whole[22:])]:
        file = tmp_path / f"{name}.jsonl.gz"
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}.jsonl.gz: the gzip stream is damaged or cut short"):
            texts(file)


def test_bad_options(write):
    file = write("a.txt", "x")
    with pytest.raises(ValueError, match="errors must be 'strict' or 'replace'"):
        texts(file, errors="ignore")
    with pytest.raises(ValueError, match="separator is empty"):
        texts(file, separator="")
