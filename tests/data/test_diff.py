"""`python -m grist_data.diff`: says what differs, and nothing where nothing does."""

from __future__ import annotations

import json

import numpy as np
import pytest
from text_corpus import corpus_texts, write_jsonl

from grist_data import document_index
from grist_data.diff import differences, main
from grist_data.document_index import DocumentIndex, common_documents
from grist_data.prepare import prepare
from grist_data.shard_writer import write_shard
from grist_data.shards import Shards


def test_a_copy_is_the_same(dataset, own_dataset, capsys):
    assert differences(dataset, own_dataset) == []
    assert main([str(dataset), str(own_dataset)]) == 0
    assert "are the same dataset" in capsys.readouterr().out


def variant(tmp_path, config, dataset, texts, **changes):
    paths = (str(write_jsonl(tmp_path / "corpus.jsonl", texts)),)
    name = "dataset"
    return prepare(config(tmp_path / name, paths=paths, tokenizer=str(dataset), shard_tokens=3000, **changes))


@pytest.fixture(scope="module")
def again(tmp_path_factory, config, dataset):
    """The corpus under the tokenizer of `dataset`, read from a path of its own."""
    return variant(tmp_path_factory.mktemp("again"), config, dataset, corpus_texts())


def of_splits(one, other) -> list[str]:
    return [line for line in differences(one, other) if line.startswith("split ")]


def test_settings_are_compared(again, tmp_path, config, dataset, capsys):
    other = variant(tmp_path, config, dataset, corpus_texts(), token_dtype="uint32")
    assert main([str(again), str(other)]) == 1
    out = capsys.readouterr().out
    assert "settings.token_dtype: 'auto', then 'uint32'" in out
    assert "split train: ids of uint16, then uint32" in out
    assert "differs, in document" not in out


def test_another_document_is_counted(again, tmp_path, config, dataset):
    texts = corpus_texts()
    own = "a document of its own\n"
    other = variant(tmp_path, config, dataset, [*texts[:30], own, *texts[31:]])
    lines = of_splits(again, other)
    told = [line for line in lines if "documents are in both" in line]
    assert sum("1 only in the first" in line for line in told) == 1
    assert sum("1 only in the second" in line for line in told) == 1
    common = [
        common_documents(*(DocumentIndex(Shards.open(directory, split)) for directory in (again, other)))
        for split in ("train", "val")
    ]
    assert sum(common) == len(texts) - 1
    assert any(f"{number} documents are in both" in told[0] for number in common)


def test_another_order_is_told(again, tmp_path, config, dataset):
    other = variant(tmp_path, config, dataset, corpus_texts()[::-1])
    lines = of_splits(again, other)
    assert sum("documents in another order, from document 0 on" in line for line in lines) == 2
    assert not any("only in" in line for line in lines)


def test_another_tokenizer(dataset, tmp_path, config):
    other = prepare(config(tmp_path / "other", vocab_size=300, shard_tokens=3000))
    lines = differences(dataset, other)
    assert "tokenizer.vocab_size: 320, then 300" in lines
    assert any(line.startswith("tokenizer.sha256: ") for line in lines)
    assert not any("documents are in both" in line or "another order" in line for line in lines)


def test_a_missing_split(again, tmp_path, config, dataset):
    other = variant(tmp_path, config, dataset, corpus_texts(), val_fraction=0.0)
    assert "split val: only in the first" in differences(again, other)
    assert "split val: only in the second" in differences(other, again)


@pytest.mark.parametrize("offset", [0, 3])
def test_the_first_token_that_differs_is_named(dataset, own_dataset, offset):
    """A shard of the same texts and other tokens, as another engine might encode them."""
    shard = Shards.open(own_dataset).shards[1]
    number = Shards.open(own_dataset).shards[0].header.n_docs + 2
    start = Shards.open(own_dataset).shards[0].header.n_tokens
    place = int(shard.doc_ends[1]) + offset
    ids = shard.tokens(0, shard.header.n_tokens).copy()
    ids[place] = (ids[place] + 1) % 300
    header = write_shard(
        shard.path, shard.header.encoding, [ids], shard.doc_ends, shard.doc_hashes.tobytes(), shard.metadata,
        shard.header.shard, shard.header.n_shards,
    )  # fmt: skip
    reseal(own_dataset, shard.path.name, f"{header.root:016x}")
    (line,) = differences(dataset, own_dataset)
    assert f"token {start + place:,} differs, in document {number:,}" in line


def reseal(directory, file: str, root: str) -> None:
    from grist_data.manifest import read_manifest, write_manifest

    manifest = read_manifest(directory)
    for facts in manifest["splits"].values():
        for entry in facts["shards"]:
            entry["root"] = root if entry["file"] == file else entry["root"]
    rest = {key: manifest[key] for key in ("source", "held_out", "settings")}
    write_manifest(directory, manifest["splits"], manifest["tokenizer"], rest)


def test_many_documents_are_compared_in_buckets(again, dataset, monkeypatch):
    one, other = (DocumentIndex(Shards.open(directory)) for directory in (again, dataset))
    whole = common_documents(one, other)
    monkeypatch.setattr(document_index, "_BUCKET_DOCUMENTS", 5)
    monkeypatch.setattr(document_index, "PIECE_DOCUMENTS", 7)
    assert common_documents(one, other) == whole == one.n_docs


class Hashes:
    """An index of documents with these hashes."""

    def __init__(self, *hashes: bytes) -> None:
        self.n_docs, self._hashes = len(hashes), np.array(sorted(hashes), "S16")

    def bucket(self, bucket: int, n_buckets: int) -> np.ndarray:
        return self._hashes


def test_copies_of_a_text_are_counted_as_often_as_both_have_them():
    one, other = Hashes(b"a", b"a", b"a", b"b", b"c"), Hashes(b"a", b"a", b"b", b"b", b"d")
    assert common_documents(one, other) == common_documents(other, one) == 3  # pyright: ignore[reportArgumentType]


def test_what_is_no_dataset(dataset, tmp_path, capsys):
    assert main([str(dataset), str(tmp_path)]) == 2
    assert "no dataset in" in capsys.readouterr().err


def test_status_is_of_the_content_alone(dataset, own_dataset, capsys):
    manifest = own_dataset / "dataset.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))  # other spaces
    assert main([str(dataset), str(own_dataset)]) == 0
