"""The files source: .zst (written here by hand, from the format's definition), .arrow, and templates."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from grist_data.command_line import main
from grist_data.prepare import PrepareConfig, prepare
from grist_data.sources import compressed, files, text_files

ROWS = [{"title": f"mill {n}", "year": 1800 + n, "text": f"grain {n} 小麦"} for n in range(2500)]
TEMPLATE = "{title} ({year})\n\n{text}"
TEXTS = [f"mill {n} ({1800 + n})\n\ngrain {n} 小麦" for n in range(2500)]


def texts(*paths: Path | str, **options) -> list[str]:
    return [document.text for document in files.documents(tuple(map(str, paths)), **options)]


def write_rows(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def frame(data: bytes) -> bytes:
    """A zstd frame of raw blocks (RFC 8878, section 3.1): magic, a window of 1 MiB, blocks of at most 100,000 bytes."""
    cuts = range(0, max(1, len(data)), 100_000)
    pieces = [data[cut : cut + 100_000] for cut in cuts]
    heads = [len(piece) << 3 | (k + 1 == len(pieces)) for k, piece in enumerate(pieces)]
    blocks = (head.to_bytes(3, "little") + piece for head, piece in zip(heads, pieces, strict=True))
    return b"\x28\xb5\x2f\xfd" + b"\x00\x50" + b"".join(blocks)


@pytest.fixture
def zstd():
    try:
        compressed._zstd("a.zst")
    except ImportError:
        pytest.skip("needs zstandard, or Python 3.14")


@pytest.mark.parametrize("read_bytes", [1, 7, 1 << 20])
def test_zstd_of_several_frames(zstd, tmp_path, monkeypatch, read_bytes):
    """pzstd writes many frames and skippable ones between them, and files are joined with cat."""
    monkeypatch.setattr(text_files, "_READ_BYTES", read_bytes)
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    (tmp_path / "a.txt.zst").write_bytes(frame(b"one\r\n") + skippable + frame(b"") + frame("小麦".encode()))
    assert texts(tmp_path / "a.txt.zst") == ["one\n小麦"]
    lines = b'{"text": "a"}\n{"text": "b"}\n'
    (tmp_path / "b.jsonl.zst").write_bytes(frame(lines[:9]) + frame(lines[9:]))
    assert texts(tmp_path / "b.jsonl.zst") == ["a", "b"]


def test_large_zstd_comes_in_blocks(zstd, tmp_path):
    data = bytes(range(256)) * 4000
    path = tmp_path / "a.bin.zst"
    path.write_bytes(frame(data))
    blocks = list(compressed.blocks(path, "a", 1 << 20))
    assert b"".join(blocks) == data
    assert max(map(len, blocks)) < 300_000


def test_damaged_zstd(zstd, tmp_path):
    whole = frame(b'{"text": "a"}\n') + frame(b'{"text": "b"}\n')
    for name, data, message in [
        ("cut", whole[:-3], "cut short"),
        ("empty", b"", "cut short"),
        ("not", b"plain text", "damaged"),
        ("tail", whole + b"plain text", "damaged"),
    ]:
        path = tmp_path / f"{name}.jsonl.zst"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}.jsonl.zst: the zstd stream is {message}"):
            texts(path)


def test_zstd_without_a_reader(tmp_path, monkeypatch):
    for name in ("zstandard", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.txt.zst").write_bytes(frame(b"one"))
    with pytest.raises(ImportError, match=r"a.txt.zst needs the package zstandard.*pip install gristmill\[files\]"):
        texts(tmp_path / "a.txt.zst")


@pytest.mark.parametrize("compression", [None, "lz4"])
@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow(tmp_path, form, compression):
    """In batches larger and smaller than what is read at once, in both forms of Arrow IPC."""
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.ipc

    table = pyarrow.Table.from_pylist(ROWS)
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    writer = {"stream": pyarrow.ipc.new_stream, "file": pyarrow.ipc.new_file}[form]
    for size in (700, 2500):
        path = tmp_path / f"{size}.arrow"
        with writer(str(path), table.schema, options=options) as out:
            out.write_table(table, max_chunksize=size)
        assert texts(path, template=TEMPLATE) == TEXTS
        assert texts(path) == [row["text"] for row in ROWS]
        ids = [document.id for document in files.documents((str(path),))]
        assert (ids[0], ids[-1]) == (f"{path}:0", f"{path}:2499")
    with pytest.raises(ValueError, match=r"2500.arrow: no column 'body'; the columns are title, year, text"):
        texts(tmp_path / "2500.arrow", text_column="body")
    data = (tmp_path / "700.arrow").read_bytes()
    for name, content in (("cut", data[: len(data) // 2]), ("not", b"plain text"), ("empty", b"")):
        (tmp_path / f"{name}.arrow").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.arrow: not a readable arrow file"):
            texts(tmp_path / f"{name}.arrow")


def test_what_datasets_saves(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS[:30]).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert texts(tmp_path / "saved", template=TEMPLATE) == TEXTS[:30]


def test_columns_that_are_not_utf8(tmp_path):
    """Arrow stores strings unchecked; the row is named all the same."""
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    data = [b"fine"] * 2000 + [None, b"fo\xffur"]
    column = pyarrow.array(data, pyarrow.binary()).view(pyarrow.string())
    for path, rows in ((tmp_path / "a.parquet", column), (tmp_path / "b.parquet", column.slice(2001))):
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)
    with pytest.raises(ValueError, match=r"a.parquet:2001: byte 0xff is not UTF-8; .*errors=replace"):
        texts(tmp_path / "a.parquet")
    assert texts(tmp_path / "b.parquet", errors="replace") == ["fo\ufffdur"]


def test_template_of_every_kind(tmp_path):
    lines = write_rows(tmp_path / "a.jsonl")
    assert texts(lines, template=TEMPLATE) == TEXTS
    assert texts(lines, template="{{{year}}} {title}{title}")[0] == "{1800} mill 0mill 0"
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "b.parquet", row_group_size=300)
    assert texts(tmp_path / "b.parquet", template=TEMPLATE) == TEXTS
    assert texts(tmp_path / "b.parquet", template="{title}{title}")[0] == "mill 0mill 0"
    with pytest.raises(ValueError, match=r"b.parquet: no column 'author'; the columns are title, year, text"):
        texts(tmp_path / "b.parquet", template="{author}: {text}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "b"}, r"a.jsonl:2: expected an object with the key 'title', but got the keys text"),
        ([1], r"a.jsonl:2: expected an object with the key 'title', but got list"),
        ({"title": None, "text": "b"}, r"a.jsonl:2: expected a text or a whole number in 'title', but got NoneType"),
        ({"title": True, "text": "b"}, r"a.jsonl:2: expected a text or a whole number in 'title', but got bool"),
        (
            {"title": 1.5, "text": "b"},
            r"a.jsonl:2: expected a text or a whole number in 'title', but got float \(1.5\)",
        ),
    ],
)
def test_rows_that_a_template_does_not_fit(tmp_path, row, message):
    path = write_rows(tmp_path / "a.jsonl", [ROWS[0], row])
    with pytest.raises(ValueError, match=message):
        texts(path, template="{title}: {text}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "no column"}, "names no column"),
        ({"template": "{text"}, "malformed: .*a literal brace is written twice"),
        ({"template": "{}"}, r"expected plain column names in braces, as in \{title\}, but got \{\}"),
        ({"template": "{year:04d}"}, r"but got \{year:04d\}"),
        ({"template": "{title!r}"}, r"but got \{title!r\}"),
        ({"template": "{text}", "text_column": "text"}, "not both"),
    ],
)
def test_bad_templates(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        texts(write_rows(tmp_path / "a.jsonl", ROWS[:1]), **options)


def test_a_text_file_has_no_columns(tmp_path):
    (tmp_path / "a.txt").write_text("grain")
    with pytest.raises(ValueError, match=r"a.txt: a .txt file has no columns for the template"):
        texts(tmp_path, template="{text}")


def test_a_preparation_keeps_its_template(tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", ROWS[:40])
    settings = {"source": "files", "paths": (str(rows),), "out": str(tmp_path / "d"), "vocab_size": 300}
    prepare(PrepareConfig(**settings, template="{title}\n{text}"))
    prepare(PrepareConfig(**settings, template="{title}\n{text}", cache_dir="elsewhere"))
    with pytest.raises(ValueError, match=r"of other settings \(template was '{title}.*now None\)"):
        prepare(PrepareConfig(**settings))
    again = ["--source", "files", "--paths", str(rows), "--out", str(tmp_path / "d"), "--vocab_size", "300"]
    assert main([*again, "--template", r"{title}\n{text}"]) == 0
