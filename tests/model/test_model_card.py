from __future__ import annotations

import json

import pytest
import torch

from grist_model import load, save
from grist_model.model_card import MARK, CardFacts, is_generated, model_card, write_card

FACTS = CardFacts(
    "Miller 3",
    license="apache-2.0",
    base_model="hf://openai/gpt-oss-20b@main",
    datasets=("HuggingFaceFW/fineweb-edu", "the plays of Shakespeare", "/data/mine"),
    languages=("en",),
    metrics={"bits_per_byte": 1.42345678, "perplexity": 7.5},
    training={"tokens": "1,000,000", "optimizer": "muon"},
    limits=("It has read nothing written after 1616.",),
)


def plain(**changes):
    return {
        "sinks": False,
        "mlp_bias": False,
        "router_bias": False,
        "swiglu_alpha": None,
        "swiglu_limit": None,
    } | changes


def test_the_front_matter_is_what_the_hub_reads(make_model, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    save(make_model(), tmp_path / "model")
    data = hub.ModelCard(model_card(tmp_path / "model", FACTS)).data.to_dict()
    assert data == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "openai/gpt-oss-20b",
        "datasets": ["HuggingFaceFW/fineweb-edu"],  # names on the hub alone
        "language": ["en"],
        "tags": ["gristmill", "gpt_oss"],
        "metrics": ["bits_per_byte", "perplexity"],
    }


def test_the_text_gives_sizes_data_figures_and_how_to_run(make_model, tmp_path):
    model = make_model()
    save(model, tmp_path / "model", dtype=torch.bfloat16)
    text = model_card(tmp_path / "model", FACTS)
    assert text.index(MARK) < text.index("# Miller 3")
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in text
    assert "| experts | 4, 2 active a token |" in text
    assert "| weights | bfloat16 |" in text
    assert "| bits per byte | 1.423 |" in text
    for words in ("the plays of Shakespeare", "hf://openai/gpt-oss-20b@main", "optimizer | muon", "after 1616"):
        assert words in text
    for program in ("transformers", "vllm serve", "convert_hf_to_gguf.py", "python -m grist_tools.generate"):
        assert program in text
    assert "llama.cpp rounds the ends of YaRN's ramp" in text


def test_a_chat_model_is_run_with_messages(make_model, tmp_path):
    save(make_model(), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    text = model_card(tmp_path / "model", CardFacts("Miller"))
    assert '"role": "user"' in text
    assert "grist_tools.chat" in text
    assert "conversational" in text
    assert "not trained to follow" not in text


def test_a_model_in_our_own_layout_promises_no_other_program(make_model, tmp_path):
    save(make_model(shared_expert_width=8), tmp_path / "model")
    text = model_card(tmp_path / "model", CardFacts("Miller"))
    assert "library_name: gristmill" in text
    assert "pipeline(" not in text
    assert "which other programs do not read" in text


def test_nothing_is_invented(make_model, tmp_path):
    save(make_model(**plain(experts=0, window_layers="none", yarn=None)), tmp_path / "model")
    text = model_card(tmp_path / "model", CardFacts("Miller", base_model="runs/quickstart/model"))
    assert "license" not in text
    assert "base_model" not in text
    assert "None were measured." in text
    assert "Not stated." in text
    assert "YaRN" not in text


def test_a_card_of_ones_own_is_never_overwritten(make_model, tmp_path):
    directory = tmp_path / "model"
    save(make_model(layers=2), directory)
    assert write_card(directory, CardFacts("First"))
    assert is_generated(directory / "README.md")
    assert write_card(directory, CardFacts("Second"))
    assert "# Second" in (directory / "README.md").read_text()
    (directory / "README.md").write_text((directory / "README.md").read_text().replace(MARK, "Mine."))
    own = (directory / "README.md").read_bytes()
    assert not write_card(directory, CardFacts("Third"))
    save(make_model(), directory)
    assert (directory / "README.md").read_bytes() == own
    assert load(directory).config.layers == 3


def test_a_card_of_the_weights_before_goes_with_them(make_model, tmp_path):
    save(make_model(layers=2), tmp_path / "model")
    write_card(tmp_path / "model", FACTS)
    save(make_model(), tmp_path / "model")
    assert not (tmp_path / "model" / "README.md").exists()


def test_a_directory_without_a_model_gets_no_card(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        write_card(tmp_path, FACTS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match="model_type 'mamba'"):
        write_card(tmp_path, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
