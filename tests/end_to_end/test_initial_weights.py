"""A run that begins with the weights of another model: a family of the ecosystem is trained on, and saved as what it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import losses, train, write_run

import grist_model
from grist_data import Shards, Tokenizer
from grist_eval import bits_per_byte

transformers = pytest.importorskip("transformers")


def _write(folder: Path) -> Path:
    """A directory written by transformers with the dataset's tokenizer, and a run that begins there."""
    first = write_run(folder, steps=1, checkpoint={"every": 0}, evaluate={"every": 0})
    train(first)  # makes the dataset
    torch.manual_seed(0)
    shared = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, **shared,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "theirs")
    Tokenizer.load(folder / "dataset").save(folder / "theirs")
    run = yaml.safe_load(first.read_text())
    run |= {"initial": str(folder / "theirs"), "name": "tuned", "steps": 12, "checkpoint": {"every": 6}}
    run |= {"model": {"aux_loss_weight": 0.0}, "data": {"directory": str(folder / "dataset"), "sequence_length": 64}}
    path = folder / "tuned.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def test_a_model_of_the_ecosystem_is_trained_on_by_two_ranks_and_by_one(tmp_path):
    """On one rank other families too: test_finetune.py."""
    run = _write(tmp_path)
    train(run, "--stop_at", "7", processes=2)
    train(run)
    found = losses(tmp_path, "tuned")
    assert sorted(found) == list(range(1, 13))
    before = bits_per_byte(
        grist_model.load(tmp_path / "theirs"), Shards.open(tmp_path / "dataset", "val"), sequence_length=64
    )
    after = json.loads((tmp_path / "runs/tuned/evaluation.json").read_text())
    assert found[1] == pytest.approx(before["loss"], rel=0.05), "the first step has the loss of the model it began with"
    assert after["loss"] < 0.97 * before["loss"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs/tuned/model", dtype=torch.float32)
    assert model.config.model_type == "llama"
    ids = torch.arange(40)[None]
    with torch.no_grad():
        want = grist_model.load(tmp_path / "runs/tuned/model")(ids)
        assert float((model.eval()(ids).logits - want).abs().max()) < 1e-4


def test_what_does_not_fit_is_refused(tmp_path):
    run = _write(tmp_path)
    long = train(run, "--data.sequence_length", "128", check=False)
    assert long.returncode == 1
    assert "data.sequence_length 128 is longer than model.context_length 64" in long.stderr
    tokenizer = json.loads((tmp_path / "theirs/tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (tmp_path / "theirs/tokenizer.json").write_text(json.dumps(tokenizer))
    other = train(run, check=False)
    assert other.returncode == 1
    assert "made with another tokenizer" in other.stderr
    missing = train(run, "--initial", str(tmp_path / "nowhere"), check=False)
    assert missing.returncode == 1
    assert "is not a model directory" in missing.stderr
    assert not any("Traceback" in done.stderr for done in (long, other, missing))
