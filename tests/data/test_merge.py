"""`python -m grist_data.merge`: joined datasets are their documents one after the other, and remember where they are from."""

from __future__ import annotations

import json

import numpy as np
import pytest
from text_corpus import corpus_texts, write_jsonl

from grist_data import Shards
from grist_data.document_index import DocumentIndex, common_documents
from grist_data.merge import main, merge
from grist_data.prepare import prepare
from grist_data.verify import problems_of


@pytest.fixture(scope="module")
def second(tmp_path_factory, config, dataset):
    """Other documents under the same tokenizer, in wider ids."""
    folder = tmp_path_factory.mktemp("second")
    paths = (str(write_jsonl(folder / "more.jsonl", corpus_texts(documents=25, seed=2))),)
    return prepare(config(folder / "second", paths=paths, tokenizer=str(dataset), token_dtype="uint32"))


@pytest.mark.parametrize("shard_tokens", [1, 5000, 2**27])
def test_merged_is_one_after_the_other(tmp_path, dataset, second, shard_tokens):
    out = merge([dataset, second], tmp_path / "all", shard_tokens)
    assert problems_of(out) == []
    for split in ("train", "val"):
        parts = [Shards.open(directory, split) for directory in (dataset, second)]
        whole = Shards.open(out, split, verify="full")
        assert np.array_equal(whole.read(0, whole.n_tokens), np.concatenate([p.read(0, p.n_tokens) for p in parts]))
        ends = [DocumentIndex(part).ends(0, part.n_docs) for part in parts]
        joined = np.concatenate([ends[0], ends[1] + parts[0].n_tokens])
        assert np.array_equal(DocumentIndex(whole).ends(0, whole.n_docs), joined)
        hashes = [DocumentIndex(part).hashes(0, part.n_docs) for part in parts]
        assert np.array_equal(DocumentIndex(whole).hashes(0, whole.n_docs), np.concatenate(hashes))
        assert whole.n_bytes == sum(part.n_bytes for part in parts)
        assert whole.dtype == np.uint32
        sizes = [shard.header.n_tokens for shard in whole.shards]
        assert all(size >= shard_tokens for size in sizes[:-1])
        assert len(sizes) == {1: sum(len(part.shards) for part in parts), 2**27: 1}.get(shard_tokens, len(sizes))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all"]


def test_provenance_is_kept(tmp_path, dataset, second):
    manifests = [json.loads((directory / "dataset.json").read_text()) for directory in (dataset, second)]
    source = json.loads((merge([dataset, second], tmp_path / "all") / "dataset.json").read_text())["source"]
    assert [part["dataset_id"] for part in source["datasets"]] == [manifest["dataset_id"] for manifest in manifests]
    assert [part["settings"] for part in source["datasets"]] == [manifest["settings"] for manifest in manifests]
    assert source["documents"] == sum(manifest["source"]["documents"] for manifest in manifests)
    assert source["held_out_but_trained_on"] == 0


def test_held_out_documents_that_another_dataset_trains_on_are_told(tmp_path, dataset, config, capsys):
    other = prepare(config(tmp_path / "other", tokenizer=str(dataset), seed=7))
    out = merge([dataset, other], tmp_path / "all")
    expected = sum(
        common_documents(DocumentIndex(Shards.open(a, "val")), DocumentIndex(Shards.open(b)))
        for a, b in ((dataset, other), (other, dataset))
    )
    assert expected > 0
    assert json.loads((out / "dataset.json").read_text())["source"]["held_out_but_trained_on"] == expected
    assert f"{expected} held-out documents are trained on as well" in capsys.readouterr().err


def test_datasets_that_do_not_go_together(tmp_path, dataset, config):
    other = prepare(config(tmp_path / "other", vocab_size=300))
    with pytest.raises(ValueError, match=r"other was made with another tokenizer than .*: sha256 \w+, expected \w+"):
        merge([dataset, other], tmp_path / "all")
    bare = prepare(config(tmp_path / "bare", tokenizer=str(dataset), append_eot=False))
    with pytest.raises(ValueError, match=r"bare and .* differ in append_eot"):
        merge([dataset, bare], tmp_path / "all")
    with pytest.raises(ValueError, match="at least two"):
        merge([dataset], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_damaged_dataset_is_refused(tmp_path, own_dataset, second, capsys):
    path = sorted(own_dataset.glob("train-*.tok"))[0]
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert main([str(own_dataset), str(second), "--out", str(tmp_path / "all")]) == 2
    assert f"{path}: block 0 of section tokens" in capsys.readouterr().err
    assert not list(tmp_path.glob("all*"))
