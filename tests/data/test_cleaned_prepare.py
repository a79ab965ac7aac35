"""Cleaning inside a preparation: what is left out is counted, and is the same for any number of processes."""

from __future__ import annotations

import random

import pytest
from text_corpus import WORDS, corpus_texts, write_jsonl

from grist_data import PrepareConfig, Shards, Tokenizer, prepare, spread
from grist_data.cleaning import CleanConfig, Cleaner
from grist_data.manifest import read_manifest
from grist_data.preparation import Preparation


def texts_of(directory) -> set[str]:
    tokenizer, found = Tokenizer.load(directory), set()
    for split in read_manifest(directory)["splits"]:
        shards = Shards.open(directory, split)
        found |= set(tokenizer.decode(shards.read(0, shards.n_tokens).tolist()).split("<|endoftext|>"))
    return found - {""}


def test_rules_leave_documents_out(tmp_path):
    texts = [*corpus_texts(20), "short", "also short", "grain\n" * 40]
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    settings = {"source": "files", "paths": (str(file),), "vocab_size": 300, "unit_bytes": 3000}
    clean = CleanConfig(min_chars=20, repetition=True)
    made = prepare(PrepareConfig(out=str(tmp_path / "d"), clean=clean, **settings))
    source = read_manifest(made)["source"]
    assert source["dropped"].pop("too_short") == {"documents": 2, "text_bytes": 15}
    assert [counts["documents"] for counts in source["dropped"].values()] == [1]
    assert source["cleaned_by"] == {}
    assert texts_of(made) == set(texts[:20])
    with pytest.raises(ValueError, match="other settings \\(clean was"):
        prepare(PrepareConfig(out=str(tmp_path / "d"), **settings))
    with pytest.raises(ValueError, match=r"the corpus is empty: .* \(left out: \d+ too_short\)"):
        prepare(PrepareConfig(out=str(tmp_path / "e"), clean=CleanConfig(min_chars=10**6), **settings))


def test_near_duplicates_are_left_out(tmp_path):
    pytest.importorskip("rensa")
    texts = corpus_texts(30)
    draw = random.Random(2)
    alike = [text.replace(" ", f" {draw.choice(WORDS)} ", 1) for text in texts[:8]]
    file = write_jsonl(tmp_path / "a.jsonl", [*texts, *alike, texts[3]])
    settings = {"source": "files", "paths": (str(file),), "vocab_size": 300, "unit_bytes": 3000, "deduplicate": "exact"}
    clean = CleanConfig(near_duplicates=True)
    made = [
        prepare(PrepareConfig(out=str(tmp_path / str(workers)), clean=clean, workers=workers, **settings))
        for workers in (1, 2)
    ]
    for directory in made:
        dropped = read_manifest(directory)["source"]["dropped"]
        assert {reason: counts["documents"] for reason, counts in dropped.items()} == {
            "duplicate": 1,
            "near_duplicate": 8,
        }
        assert "rensa" in read_manifest(directory)["source"]["cleaned_by"]
        assert texts_of(directory) == set(texts)
    assert (made[0] / "dataset.json").read_bytes() == (made[1] / "dataset.json").read_bytes()


def test_another_release_of_what_cleans_surveys_again(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", corpus_texts(20))
    config = PrepareConfig(
        source="files", paths=(str(file),), vocab_size=300, clean=CleanConfig(min_chars=20), out=str(tmp_path / "d")
    )
    spread.survey(config)
    assert Preparation(config).survey_tasks() == []
    monkeypatch.setattr(Cleaner, "versions", lambda self: {"py3langid": "0.5.0"})
    assert len(Preparation(config).survey_tasks()) == 1
