from __future__ import annotations

import sys
import types

import pytest

from grist_model import load, save
from grist_model.hub import local_directory, public_name


@pytest.fixture
def downloads(monkeypatch, make_model, tmp_path) -> list[tuple]:
    """A hub of one model, and what was asked of it."""
    asked: list[tuple] = []
    save(make_model(), tmp_path / "cached")

    def snapshot_download(repository, revision=None, allow_patterns=()):
        asked.append((repository, revision, tuple(allow_patterns)))
        return str(tmp_path / "cached")

    stand_in = types.ModuleType("huggingface_hub")
    monkeypatch.setattr(stand_in, "snapshot_download", snapshot_download, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    return asked


def test_names_of_the_hub_are_downloaded(downloads):
    assert load("hf://openai/gpt-oss-20b").config.layers == 3
    assert local_directory("hf://gpt2@main").name == "cached"
    assert [(name, revision) for name, revision, _ in downloads] == [("openai/gpt-oss-20b", None), ("gpt2", "main")]
    assert not any(pattern.endswith((".bin", ".pt", ".pth")) for pattern in downloads[0][2])


def test_anything_else_is_a_local_directory(downloads, tmp_path):
    assert local_directory(tmp_path) == tmp_path
    assert local_directory("runs/quickstart/model").parts == ("runs", "quickstart", "model")
    assert downloads == []


def test_a_name_of_the_hub_without_its_prefix_is_recognised(downloads):
    with pytest.raises(
        FileNotFoundError, match=r"is not a model directory; a model on the hub is hf://openai/gpt-oss-20b"
    ):
        load("openai/gpt-oss-20b")
    assert downloads == []


@pytest.mark.parametrize("name", ["hf://", "hf://a/b/c"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match="expected hf://owner/name"):
        local_directory(name)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install gristmill\[hub\]"):
        local_directory("hf://openai/gpt-oss-20b")


def test_a_cached_model_is_known_by_its_name():
    cached = "/home/me/.cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/93efa2f097"
    assert public_name(cached) == "HuggingFaceTB/SmolLM2-135M"
    assert public_name("cache/models--gpt2/snapshots/607a30d783") == "gpt2"
    assert public_name("runs/quickstart/model") == "runs/quickstart/model"
    assert public_name("snapshots/x") == "snapshots/x"
