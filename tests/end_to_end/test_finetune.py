"""Models of the ecosystem learn to answer: all weights or adapters, on a chat file, and go back to where they came from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_house
import torch
import yaml
from tiny_run import losses

import grist_model
from grist_train.__main__ import main
from grist_train.config import load

NUMBERS = "zero one two three four five six seven eight nine".split()


def write_chats(path: Path, examples: int = 200) -> Path:
    """Questions with one right answer: what comes after a number."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(examples):
            n = draw.randrange(9)
            asked = draw.choice(["What comes after {}?", "Say the next number: {}", "{} and then?"])
            messages = [
                {"role": "system", "content": "You count."},
                {"role": "user", "content": asked.format(NUMBERS[n])},
                {"role": "assistant", "content": f"After {NUMBERS[n]} comes {NUMBERS[n + 1]}."},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def write_model(directory: Path, family: str) -> Path:
    """A directory written by transformers, with a tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizer = tiny_house.tokenizer()
    shared = {
        "vocab_size": tokenizer.vocab_size, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": tokenizer.eot_id,
        "initializer_range": 0.1,
    }  # fmt: skip
    if family == "gpt2":
        config = transformers.GPT2Config(n_positions=128, n_embd=32, n_layer=2, n_head=4, **shared)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, **shared,
        )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save(directory)
    return directory


def write_run(folder: Path, initial: Path, **changes: Any) -> Path:
    chats = write_chats(folder / "chats.jsonl")
    prepare = {"source": "conversations", "paths": [str(chats)], "tokenizer": "initial", "chat_template": "plain"}
    run = {
        "name": "tuned",
        "out": str(folder / "runs"),
        "initial": str(initial),
        "steps": 30,
        "device": "cpu",
        "data": {
            "directory": str(folder / "dataset"),
            "prepare": {**prepare, "val_fraction": 0.2, "workers": 1},
            "sequence_length": 128,
            "packing": "best-fit",
            "document_masks": True,
        },
        "model": {"aux_loss_weight": 0.0, "router_z_loss_weight": 0.0},
        "batch": {"global_size": 4},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "compute": {"threads": 1},
        "checkpoint": {"every": 10, "portable": "best", "asynchronous": False},
        "evaluate": {"every": 10, "max_tokens": None, "batch_size": 4},
        "sample": {"prompts": ["What comes after three?"], "max_new_tokens": 12},
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_model_learns_to_answer_and_loads_where_it_came_from(tmp_path, family, adapters):
    transformers = pytest.importorskip("transformers")
    initial = write_model(tmp_path / "theirs", family)
    changes = {"lora": {"rank": 4, "alpha": 16.0}, "optimizer": {"name": "adamw", "lr": 0.03}} if adapters else {}
    main(load(write_run(tmp_path, initial, **changes)))

    run, found = tmp_path / "runs/tuned", losses(tmp_path, "tuned")
    most = 0.8 if adapters else 0.5  # a head of random numbers stays what it is under adapters
    assert found[30] < most * found[1]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["loss"] < 1.1 * most * found[1]
    assert "bits_per_byte" not in evaluation, "answers have no bytes of their own"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert evaluation["loss"] == pytest.approx(min(r["validation_loss"] for r in rows if "validation_loss" in r))
    samples = (run / "samples.txt").read_text()
    assert "prompt: 'What comes after three?'" in samples
    assert "--- greedy\nWhat comes" not in samples, "an answer does not repeat the message"

    ids = torch.arange(2, 42)[None]
    ours = grist_model.load(run / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    assert theirs.config.model_type == family
    with torch.no_grad():
        want = ours(ids)
        assert float((theirs.eval()(ids).logits - want).abs().max()) < 1e-4
        assert (run / "model/chat_template.jinja").read_text().startswith("{% for message")
        if adapters:
            peft = pytest.importorskip("peft")
            base = transformers.AutoModelForCausalLM.from_pretrained(initial, dtype=torch.float32)
            tuned = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
            assert float((tuned(ids).logits - want).abs().max()) < 1e-4
        assert (run / "adapter").exists() == adapters
