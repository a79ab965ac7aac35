"""The `datasets` source, on local data: the hub itself is not there in a test."""

from __future__ import annotations

import json

import pytest

from grist_data import PrepareConfig, Shards, prepare, spread
from grist_data.sources import huggingface

datasets = pytest.importorskip("datasets")
TEXTS = ["grain", "mill 小麦", "flour", "stone"]


@pytest.fixture
def jsonl(tmp_path):
    file = tmp_path / "data" / "train.jsonl"
    file.parent.mkdir()
    file.write_text(
        "".join(json.dumps({"text": text, "n": k}) + "\n" for k, text in enumerate(TEXTS)), encoding="utf-8"
    )
    return file


@pytest.fixture
def read(tmp_path):
    def read_texts(name, **options) -> list[str]:
        cached = {"cache_dir": str(tmp_path / "cache"), **options}
        return [document.text for document in huggingface.documents(str(name), **cached)]

    return read_texts


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_file_and_a_directory(jsonl, read, streaming):
    assert read(jsonl, streaming=streaming) == TEXTS
    assert read(jsonl.parent, streaming=streaming) == TEXTS
    assert read(jsonl, streaming=streaming, max_documents=2) == TEXTS[:2]


def test_saved_datasets(tmp_path, read):
    whole = datasets.Dataset.from_dict({"body": TEXTS})
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole.select([0]), "test": whole}).save_to_disk(tmp_path / "several")
    assert read(tmp_path / "one", text_column="body") == TEXTS
    assert read(tmp_path / "several", text_column="body", split="test") == TEXTS
    with pytest.raises(ValueError, match="has no split 'val'; its splits are train, test"):
        read(tmp_path / "several", split="val")


def test_bad_columns_and_files(jsonl, read, tmp_path):
    with pytest.raises(ValueError, match="has no column 'body'; its columns are text, n"):
        read(jsonl, text_column="body")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"train.jsonl:0: expected a text in 'n', but got 0"):
            read(jsonl, text_column="n", streaming=streaming)
    other = tmp_path / "a.xml"
    other.write_text("x")
    with pytest.raises(ValueError, match=r"a.xml: unknown kind of file"):
        read(other)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_prepared(jsonl, tmp_path, streaming):
    made = prepare(
        PrepareConfig(
            source="huggingface",
            name=str(jsonl),
            streaming=streaming,
            cache_dir=str(tmp_path / "cache"),
            vocab_size=257,
            out=str(tmp_path / "d"),
        )
    )
    assert sum(Shards.open(made, split).n_docs for split in ("train", "val")) == len(TEXTS)


def test_ids_say_where_a_row_is(jsonl, tmp_path):
    ids = [d.id for d in huggingface.documents(str(jsonl), cache_dir=str(tmp_path / "cache"))]
    assert ids[1] == f"{jsonl}:train:1"


def test_rows_are_read_in_pieces(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "_PIECE_ROWS", 3)
    options: dict = {"name": str(jsonl), "cache_dir": str(tmp_path / "cache")}
    pieces = list(huggingface.pieces(300, **options))
    assert [(piece.start, piece.stop, piece.size) for piece in pieces] == [(0, 3, 300), (3, 4, 100)]
    found = [document for piece in pieces for document in huggingface.read_piece(piece, **options)]
    assert found == list(huggingface.documents(**options))
    assert [piece.stop for piece in huggingface.pieces(300, max_documents=2, **options)] == [2]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_stream_goes_on_from_a_state(jsonl, tmp_path, after, kind):
    file = jsonl
    if kind == "parquet":
        file = tmp_path / "a.parquet"
        datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(file)
    found = huggingface.stream(None, name=str(file))
    state = [next(found) for _ in range(after)][-1][1]()
    rest = huggingface.stream(json.loads(json.dumps(state)), name=str(file))
    assert [document.text for document, _ in rest] == TEXTS[after:]
    assert [document.text for document, _ in huggingface.stream(None, name=str(file), max_documents=after)] == TEXTS[
        :after
    ]
    limited = huggingface.stream(state, name=str(file), max_documents=after + 1)
    assert [document.id for document, _ in limited] == [f"{file}:train:{after}"][: len(TEXTS) - after]


def test_a_stream_is_read_once(jsonl, tmp_path, monkeypatch):
    opened = []
    real = huggingface._opened
    monkeypatch.setattr(huggingface, "_opened", lambda *options: opened.append(options) or real(*options))
    config = PrepareConfig(
        source="huggingface", name=str(jsonl), streaming=True, vocab_size=257, out=str(tmp_path / "d"), workers=1
    )
    made = prepare(config)
    assert len(opened) == 1
    assert sum(Shards.open(made, split).n_docs for split in ("train", "val")) == len(TEXTS)
    assert not (made / "spool").exists()
    with pytest.raises(ValueError, match="a stream is read once, by one task"):
        spread.survey(PrepareConfig(**{**vars(config), "out": str(tmp_path / "e")}), 0, 2)


def test_the_commit_is_found_among_the_files():
    commit = "0123456789abcdef0123456789abcdef01234567"
    files = {f"hf://datasets/owner/name@{commit}/data/{k}.parquet": {"num_bytes": 1} for k in range(2)}
    assert huggingface._revision(files) == {"revision": commit}
    assert huggingface._revision({"/data/train.jsonl": {}}) == {}
    assert huggingface.facts(__file__) == {}
