"""A corpus of JSON lines, and datasets prepared from it, for the tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from text_corpus import corpus_texts, write_jsonl

from grist_data.prepare import PrepareConfig, prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", corpus_texts())


@pytest.fixture(scope="session")
def config(corpus):
    """PrepareConfig of the corpus with small units; keyword arguments replace settings."""

    def make(out: Path, **changes) -> PrepareConfig:
        settings = {
            "source": "files",
            "paths": (str(corpus),),
            "vocab_size": 320,
            "val_fraction": 0.2,
            "unit_bytes": 4000,
        }
        return PrepareConfig(out=str(out), **settings | changes)

    return make


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, config) -> Path:
    """A finished dataset of several shards; read it only."""
    return prepare(config(tmp_path_factory.mktemp("dataset") / "dataset", shard_tokens=3000))


@pytest.fixture
def own_dataset(tmp_path, dataset) -> Path:
    """A copy of `dataset` to damage."""
    return Path(shutil.copytree(dataset, tmp_path / "own"))
