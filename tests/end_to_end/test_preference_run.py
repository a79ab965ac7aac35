"""Training on pairs of answers, from a file of them to a portable model that prefers the better ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny_house
import torch
import yaml
from tiny_run import WORDS, losses, train

import grist_model
from grist_data import Tokenizer
from grist_data.preferences import read_preferences
from grist_train.preference_batches import pair_batch
from grist_train.preference_loss import answer_log_probabilities

TEMPLATE = (
    "{% for message in messages %}### {{ message.role }}:\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


def _write(folder: Path, **changes) -> Path:
    """A small model with a chat template, pairs whose better answer repeats the question's word, and a run."""
    tiny_house.portable(folder / "base")
    (folder / "base/chat_template.jinja").write_text(TEMPLATE)
    rows = [
        {"prompt": f"{word} and {other}?", "chosen": f"{word}!", "rejected": f"{other}, {word}."}
        for word in WORDS
        for other in WORDS[:4]
        if word != other
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "name": "tuned",
        "out": str(folder / "runs"),
        "initial": str(folder / "base"),
        "steps": 12,
        "log_every": 1,
        "device": "cpu",
        "preferences": {"paths": [str(folder / "pairs.jsonl")], "beta": 0.5, "val_fraction": 0.2},
        "model": {"aux_loss_weight": 0.0},
        "batch": {"global_size": 8, "micro_size": 2},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "schedule": {"kind": "constant", "warmup_steps": 0},
        "compute": {"threads": 1},
        "checkpoint": {"every": 6, "portable": "best"},
        "evaluate": {"every": 6},
        "sample": {"prompts": ["mill and stone?"], "max_new_tokens": 4},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**run, **changes}), encoding="utf-8")
    return path


def test_preferences_are_learned_and_the_run_goes_on(tmp_path):
    run = _write(tmp_path)
    train(run, "--stop_at", "5", processes=2)
    train(run)
    rows = [json.loads(line) for line in (tmp_path / "runs/tuned/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "the model is its own reference at first"
    assert steps[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["loss"] < 0.5
    assert steps[-1]["preference_accuracy"] > 0.8
    evaluation = json.loads((tmp_path / "runs/tuned/evaluation.json").read_text())
    assert evaluation["preference_accuracy"] > 0.8
    assert evaluation["reward_chosen"] - evaluation["reward_rejected"] == pytest.approx(evaluation["reward_margin"])
    assert [row["validation_loss"] for row in rows if "validation_loss" in row][-1] == evaluation["loss"]

    alone = _write(tmp_path, name="alone")
    train(alone)
    assert losses(tmp_path, "alone") == pytest.approx(losses(tmp_path, "tuned"), rel=1e-4)
    _check_figures(tmp_path, evaluation)


def _check_figures(folder: Path, evaluation: dict) -> None:
    """The portable model's own log-probabilities of the held-out pairs give the rewards that the run reports."""
    tokenizer = Tokenizer.load(folder / "runs/tuned/model")
    pairs = read_preferences([str(folder / "pairs.jsonl")], tokenizer)
    before, after = (grist_model.load(folder / name) for name in ("base", "runs/tuned/model"))
    with torch.no_grad():
        batch = pair_batch(pairs, None, "cpu")
        gain = [answer_log_probabilities(model, model.config, batch)[0].view(-1, 2) for model in (after, before)]
    margin_P = 0.5 * ((gain[0] - gain[1])[:, 0] - (gain[0] - gain[1])[:, 1])
    assert float((margin_P > 0).float().mean()) > 0.8
    assert float(margin_P.mean()) == pytest.approx(evaluation["reward_margin"], rel=0.5)
