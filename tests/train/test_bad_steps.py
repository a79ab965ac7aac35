"""Whole runs in this process, with faults put into the loss of chosen steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run

from grist_train import distributed, tasks
from grist_train.__main__ import run
from grist_train.config import load
from grist_train.guard import NonFiniteLossError

FAULTS = {"nan": float("nan"), "inf": float("inf"), "spike": 50.0}


@pytest.fixture(scope="module")
def world():
    yield distributed.start("cpu", threads=1)
    distributed.stop()


@pytest.fixture
def train(tmp_path, world, monkeypatch):
    """A run of 16 steps: (name, faults of its losses by step, overrides) -> its folder."""
    path = tiny_run.write_run(
        tmp_path,
        steps=16,
        checkpoint={"every": 4, "asynchronous": False, "keep_last": 9},
        evaluate={"every": 0},
        sample={"prompts": []},
        optimizer={"name": "muon"},
        model={"balance": "bias"},
    )
    honest = tasks.NextToken.loss

    def start(name: str, faults: dict[int, str] | None = None, **overrides) -> Path:
        position_of_step = {8 * step: kind for step, kind in (faults or {}).items()}

        def loss(task, model, batch, counted, tokens):
            result = honest(task, model, batch, counted, tokens)
            factor = FAULTS.get(position_of_step.get(task._batches.position, ""), 1.0)
            return replace(result, objective=result.objective * factor, sums=result.sums * factor)

        monkeypatch.setattr(tasks.NextToken, "loss", loss)
        run(load(path, name=name, **overrides), world)
        return tmp_path / "runs" / name

    return start


def rows(folder: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in lines if "loss" in row}


def bad(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "bad_batches.jsonl").read_text().splitlines()]


def weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


def test_a_step_that_is_not_finite_is_skipped_and_written_down(train):
    clean, struck = train("clean"), train("struck", {6: "nan", 11: "inf"})
    found = rows(struck)
    assert sorted(found) == list(range(1, 17))
    assert [step for step, row in found.items() if row.get("skipped")] == [6, 11]
    assert found[6]["loss"] is None
    assert [rows(clean)[step]["loss"] for step in range(1, 7)][:5] == [found[step]["loss"] for step in range(1, 6)]
    assert all(found[step]["loss"] < 7 for step in (7, 10, 12, 16))
    first, second = bad(struck)
    assert (first["step"], first["why"], first["loss"], first["position"]) == (6, "not finite", None, 40)
    assert second["step"] == 11
    assert len(first["samples"]) == 8
    assert first["samples"][0].keys() == {"source", "epoch", "window", "token", "text"}
    assert all(sample["text"] for sample in first["samples"])
    assert not (clean / "bad_batches.jsonl").exists()


def test_a_skipped_step_is_as_if_its_update_had_not_been(train):
    """The weights are those of a run that leaves the same samples out."""
    struck = train("struck", {6: "nan", 7: "nan"}, **{"guard.patience": 5})
    rolled = train("rolled", {6: "nan", 7: "nan"}, **{"guard.patience": 1, "guard.rollback": True, "log_every": 1})
    assert [row["step"] for row in bad(rolled)] == [6, 7]
    assert 6 not in rows(rolled)
    assert 7 not in rows(rolled)
    for step in (5, 8, 12, 16):
        assert rows(rolled)[step]["loss"] == rows(struck)[step]["loss"], step
    assert weights(rolled) == weights(struck)
    state = json.loads((rolled / "checkpoints/step-8/state.json").read_text())
    assert state["left_out"] == [6, 7]


def test_a_spike_is_found_by_the_median_and_forgotten(train):
    options = {"guard.spike_factor": 12.0, "guard.spike_window": 8}
    clean, struck = train("clean", **options), train("struck", {9: "spike"}, **options)
    assert not (clean / "bad_batches.jsonl").exists()
    (row,) = bad(struck)
    assert row["step"] == 9
    assert row["why"] == "the loss stands far above the last ones"
    assert row["loss"] > 50
    losses = json.loads((struck / "checkpoints/step-12/state.json").read_text())["accepted_losses"]
    assert max(losses) < 10


def test_too_many_in_a_row_end_the_run_with_its_checkpoints_intact(train, tmp_path):
    with pytest.raises(NonFiniteLossError, match="4 steps in a row could not be used") as caught:
        train("broken", dict.fromkeys(range(10, 17), "nan"), log_every=1)
    assert "bad_batches.jsonl" in str(caught.value)
    folder = tmp_path / "runs/broken"
    assert [row["step"] for row in bad(folder)] == [10, 11, 12, 13]
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-12", "step-4", "step-8"]
    assert all(
        loss < 10 for loss in json.loads((folder / "checkpoints/step-12/state.json").read_text())["accepted_losses"]
    )


def test_what_fails_again_after_going_back_ends_the_run(train):
    with pytest.raises(NonFiniteLossError, match="2 steps in a row"):
        train(
            "broken",
            dict.fromkeys(range(6, 17), "nan"),
            **{"guard.patience": 1, "guard.rollback": True, "log_every": 1, "checkpoint.every": 5},
        )
