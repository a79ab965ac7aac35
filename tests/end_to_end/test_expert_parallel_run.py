"""A run whose experts are shared by two processes is the run of one process, from text to the portable model."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_run import losses, train, write_run

import grist_model

STEPS = 12
# Two micro-batches a process, so that gradients are kept between them.
SHARED = ("--compute.expert_parallel", "2", "--compute.activation_checkpointing", "block", "--batch.micro_size", "2")
HEALTH = ("router_entropy", "load_max_over_mean", "load_cv", "dead_experts")


def rows_of(folder) -> list[dict]:
    """Metrics of every step, and the evaluations of steps 6 (experts shared) and 12."""
    return [json.loads(line) for line in (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_share_the_experts_of_one(tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    for folder in (alone, shared):
        folder.mkdir()
    changes = {"steps": STEPS, "evaluate": {"every": 6}, "checkpoint": {"every": 0}, "model": {"balance": "bias"}}
    train(write_run(alone, **changes))
    stopped = train(write_run(shared, **changes), *SHARED, "--stop_at", "6", processes=2)
    assert "2 x cpu, 2 of 4 experts on each" in stopped.stderr
    train(shared / "run.yaml")  # expert_parallel is 1 again, and the checkpoint knows nothing of it

    want, got = losses(alone), losses(shared)
    assert sorted(got) == sorted(want) == list(range(1, STEPS + 1))
    for step, loss in want.items():
        assert got[step] == pytest.approx(loss, rel=1e-5), f"step {step}"
    for mine, theirs in zip(rows_of(shared), rows_of(alone), strict=True):
        for key in HEALTH if "loss" in theirs else ("validation_loss",):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3), f"{key} of step {mine['step']}"
    models = [grist_model.load(folder / "runs" / "tiny" / "model") for folder in (alone, shared)]
    ids = torch.arange(32)[None]
    torch.testing.assert_close(models[1](ids), models[0](ids), rtol=1e-3, atol=1e-4)
