"""Files at addresses, in fsspec's memory:// file system: the same rules as on the disk, and copies that are whole or absent."""

from __future__ import annotations

import sys

import pytest

from grist_data.prepare import PrepareConfig, prepare
from grist_data.sources import files, remote

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def store():
    """A file system in memory, empty before and after."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.fixture
def texts(tmp_path):
    def read(*paths: str, **options) -> list[str]:
        return [each.text for each in files.documents(paths, cache_dir=str(tmp_path / "cache"), **options)]

    return read


def copies(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".lock")


def test_files_directories_globs_and_order(store, texts, tmp_path):
    for name in ("d/b.txt", "d/a.txt", "d/sub/c.jsonl", "d/.hidden/x.txt", "d/.x.txt", "d/notes.md"):
        store.pipe(f"/{name}", b'{"text": "c"}\n' if name.endswith("jsonl") else name.encode())
    assert texts("memory://d") == texts("memory://d/") == ["d/a.txt", "d/b.txt", "c"]
    assert texts("memory://d/*.txt") == ["d/a.txt", "d/b.txt"]
    assert texts("memory://d/**/*.jsonl") == ["c"]
    assert texts("memory://d/**/a.txt") == ["d/a.txt"]
    assert texts("memory://d/.*.txt") == ["d/.x.txt"]
    assert texts("memory://d/.hidden/*.txt") == texts("memory://d/.hidden") == ["d/.hidden/x.txt"]
    (tmp_path / "here.txt").write_text("here")
    assert texts("memory://d/b.txt", str(tmp_path / "here.txt"), "memory://d/b.txt") == ["d/b.txt", "here"]
    ids = [each.id for each in files.documents(("memory://d/sub",), cache_dir=str(tmp_path / "cache"))]
    assert ids == ["memory:///d/sub/c.jsonl:1"]


def test_the_order_is_that_of_local_files(store, texts, tmp_path):
    for name in ("a/z.txt", "a-b/a.txt", "a.txt", "B.txt", "a/é.txt", "a0/a.txt"):
        store.pipe(f"/d/{name}", name.encode())
        path = tmp_path / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    assert texts("memory://d") == texts(str(tmp_path / "d"))
    assert texts("memory://d/**/*.txt") == texts(str(tmp_path / "d/**/*.txt"))


def test_nothing_found(store, texts):
    store.pipe("/d/notes.md", b"x")
    for path in ("memory://absent.txt", "memory://d", "memory://d/*.txt"):
        with pytest.raises(FileNotFoundError, match=r"no such file, or none that ends in \.txt.*: memory://"):
            texts(path)
    with pytest.raises(ValueError, match=r"memory://d/notes.md: unknown kind of file; expected one that ends in \.txt"):
        texts("memory://d/notes.md")


def test_no_permission_is_not_taken_for_no_file(store, texts, monkeypatch):
    def refused(self, path, **options):
        raise PermissionError("access denied: log in")

    monkeypatch.setattr(type(store), "info", refused)
    with pytest.raises(PermissionError, match="log in"):
        texts("memory://d/a.txt")


def test_a_copy_is_made_once_and_again_when_the_file_changes(store, texts, tmp_path, monkeypatch):
    fetched = []
    get_file = type(store).get_file
    monkeypatch.setattr(type(store), "get_file", lambda self, *a, **k: (fetched.append(a[0]), get_file(self, *a, **k)))
    store.pipe("/a.txt", b"one")
    assert texts("memory://a.txt") == texts("memory://a.txt") == ["one"]
    assert len(fetched) == 1
    store.pipe("/a.txt", b"three")
    assert texts("memory://a.txt") == ["three"]
    assert len(fetched) == 2
    info = type(store).info
    monkeypatch.setattr(type(store), "info", lambda self, *a, **k: info(self, *a, **k) | {"ETag": "of the same size"})
    store.pipe("/a.txt", b"eight")
    assert texts("memory://a.txt") == ["eight"]


def test_a_copy_is_whole_or_absent(store, texts, tmp_path, monkeypatch):
    store.pipe("/a.txt", b"grain and flour")
    get_file = type(store).get_file

    def cut(self, path, local, **options):
        get_file(self, path, local, **options)
        with open(local, "r+b") as file:
            file.truncate(5)

    def stopped(self, path, local, **options):
        cut(self, path, local, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(type(store), "get_file", cut)
        with pytest.raises(OSError, match=r"memory://a.txt: expected 15 bytes, but 5 came; run the same command again"):
            texts("memory://a.txt")
        assert copies(tmp_path) == []
        broken.setattr(type(store), "get_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            texts("memory://a.txt")
        assert copies(tmp_path) == []
    assert texts("memory://a.txt") == ["grain and flour"]
    assert copies(tmp_path) == ["a.txt"]


def test_errors_name_the_address(store, texts):
    store.pipe("/a.jsonl", b'{"text": "a"}\n{broken\n')
    with pytest.raises(ValueError, match=r"^memory://a.jsonl:2: not valid JSON"):
        texts("memory://a.jsonl")
    store.pipe("/b.parquet", b"no")
    with pytest.raises(ValueError, match=r"^memory://b.parquet: not a readable parquet file"):
        texts("memory://b.parquet")


def test_names_of_files():
    assert remote.file_name("https://host/path/a.jsonl.gz?download=true#x") == "a.jsonl.gz"
    assert remote.file_name("s3://bucket/what?.txt") == "what?.txt"
    assert remote.is_remote("hf://datasets/owner/name/a.txt")
    assert not remote.is_remote("books/a.txt")


def test_without_fsspec(texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ImportError, match=r"s3://b/a.txt needs the package fsspec: pip install gristmill\[files\]"):
        texts("s3://b/a.txt")
    (tmp_path / "a.txt").write_text("grain")
    assert texts(str(tmp_path / "a.txt")) == ["grain"]


def test_a_dataset_does_not_depend_on_where_its_files_lie(store, tmp_path):
    lines = "".join(f'{{"text": "grain number {n}"}}\n' for n in range(40)).encode()
    store.pipe("/rows/a.jsonl", lines)
    (tmp_path / "a.jsonl").write_bytes(lines)
    shards = []
    for name, path in (("here", str(tmp_path / "a.jsonl")), ("there", "memory://rows/*.jsonl")):
        settings = {"source": "files", "paths": (path,), "vocab_size": 300, "cache_dir": str(tmp_path / "cache")}
        out = prepare(PrepareConfig(**settings, out=str(tmp_path / name)))
        shards.append([file.read_bytes() for file in sorted(out.glob("*.tok"))])
    assert shards[0] == shards[1]
