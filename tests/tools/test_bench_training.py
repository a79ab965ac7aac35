"""The training benchmark: other losses are found and not timed, rates are those of the median, a real pair trains alike."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from grist_model.accounting import flops_per_token
from grist_tools import quiet_turns
from grist_tools.bench_training import FAMILIES, check_options, main, parser, setup_of, write_weights
from grist_tools.bench_training_process import Turn
from grist_tools.bench_training_rows import race, results_table
from grist_tools.bench_training_steps import OURS, THEIRS, batches, run_of
from grist_tools.quiet import Usage


def options(*more: str) -> argparse.Namespace:
    return parser().parse_args(["--repetitions", "3", "--patience", "0", *more])


SETUP = setup_of(options(), "gpt_oss", False, "")


@dataclass
class Played:
    """A contestant without a process."""

    who: str
    found: list[float] | Exception = field(default_factory=lambda: [3.0, 2.0])
    turns: list[Turn] = field(default_factory=lambda: [Turn(20.0, 30.0, 0.0)] * 3)
    stopped: bool = False

    def losses(self, steps: int) -> list[float]:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def turn(self, steps: int, patience: float) -> Turn:
        return self.turns.pop(0)

    def peak_bytes(self) -> int:
        return 5 * 2**20

    def stop(self) -> None:
        self.stopped = True


def raced(*trainers: Played) -> dict[str, dict]:
    rows = race(trainers, SETUP, options(), 1e-4, 1e12)
    assert all(trainer.stopped for trainer in trainers)
    return {row["who"]: {"model": "gpt_oss", "recompute": "none", "planned_bytes": 1, **row} for row in rows}


def test_figures_are_those_of_the_median_of_quiet_turns():
    turns = [Turn(10.0, 15.0, 0.0), Turn(99.0, 16.0, 1.0), Turn(12.0, 17.0, 0.0)]
    row = raced(Played(OURS, turns=turns), Played(THEIRS))[OURS]
    assert (row["ms"], row["lowest_ms"], row["highest_ms"], row["cpu_ms"]) == (11.0, 10.0, 12.0, 16.0)
    assert (row["quiet"], row["repetitions"]) == (2, 3)
    assert row["value"] == pytest.approx(SETUP.tokens_per_step / 11e-3)
    assert row["ratio"] == pytest.approx(20 / 11)
    assert row["mfu"] == pytest.approx(row["value"] * flops_per_token(SETUP.model, SETUP.sequence_length) / 1e12)
    assert row["peak_bytes"] == 5 * 2**20


@pytest.mark.parametrize("losses", [[3.0, 2.001], [3.0, float("nan")]])
def test_other_losses_are_wrong_and_not_timed(losses):
    wrong = Played(OURS, losses)
    rows = raced(wrong, Played(THEIRS))
    assert len(wrong.turns) == 3
    assert rows[OURS]["wrong"].startswith("the loss of step 2 is ")
    assert rows[THEIRS]["ratio"] == 1
    assert rows[OURS]["wrong"] in results_table(list(rows.values()))


def test_one_that_fails_is_said_and_nobody_is_timed_unchecked():
    rows = raced(Played(OURS), Played(THEIRS, RuntimeError("out of memory")))
    assert rows[THEIRS]["wrong"] == "out of memory"
    assert rows[OURS]["wrong"] == f"not checked: {THEIRS} has no losses"


def test_disturbed_work_is_done_again_while_there_is_time(monkeypatch):
    readings = [Usage(0, 0, 0), Usage(1, 1, 0), Usage(0, 0, 0), Usage(1, 0.1, 0)]
    monkeypatch.setattr(quiet_turns, "usage", lambda: readings.pop(0))
    monkeypatch.setattr(quiet_turns, "wait_until_quiet", lambda until: True)
    done = []
    assert quiet_turns.undisturbed(lambda: done.append(1) or len(done), float("inf")) == (2, pytest.approx(0.1))


def test_both_get_the_model_and_batch_of_the_run_file():
    assert (SETUP.micro_size, SETUP.micro_batches, SETUP.sequence_length, SETUP.dtype) == (8, 2, 128, "float32")
    assert SETUP.model.balance == "none"
    config = run_of(setup_of(options("--device", "cuda", "--micro-batches", "3"), "qwen3_moe", True, ""))
    assert (config.batch.global_size, config.batch.micro_size, config.compute.dtype) == (12, 4, "bfloat16")
    assert config.compute.activation_checkpointing == "block"
    assert not config.model.sinks
    first, again, other = (batches(SETUP, step)[1].ids_BT for step in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize("wrong", [["--families", "llama"], ["--recompute", "some"], ["--steps", "0"]])
def test_bad_options_are_told(wrong):
    with pytest.raises(ValueError, match=wrong[0]):
        check_options(options(*wrong))


def test_settings_that_are_not_read_are_named(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {yarn: {factor: 2.0}}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"model\.yarn has settings of its own"):
        setup_of(options("--run", str(path)), "gpt_oss", False, "")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_of_the_family_that_it_is_to_be(tmp_path: Path, family):
    setup = setup_of(options("--layers", "1"), family, False, str(tmp_path / "model"))
    write_weights(setup, family)
    other = next(name for name in FAMILIES if name != family)
    with pytest.raises(ValueError, match=f"was to be a {other}, but only {family}"):
        write_weights(setup, other)


def test_a_real_pair_trains_alike(tmp_path: Path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "training.json"
    small = ["--layers", "1", "--sequence-length", "16", "--micro-size", "2", "--check-steps", "3", "--steps", "1"]
    few = ["--repetitions", "1", "--patience", "0", "--recompute", "block", "--families", "gpt_oss", "--out", str(out)]
    assert main([*small, *few]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    ours, theirs = report["rows"]
    assert (ours["who"], theirs["who"]) == (OURS, THEIRS)
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert ours["losses"][-1] < ours["losses"][0]
    assert ours["peak_bytes"] > ours["planned_bytes"] / 2
    assert report["peak_flops"] > 0
    assert f"written to {out}" in capsys.readouterr().out
