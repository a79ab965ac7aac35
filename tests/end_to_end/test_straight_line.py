"""The whole line, as a user runs it: text to a portable model, stopping and going on, and what a run leaves behind."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest
import torch
import yaml
from tiny_run import command, environment, losses, train, write_run

import grist_model
from grist_data import Shards, Tokenizer
from grist_eval import bits_per_byte
from grist_train.guard import ExitCode

LEFT_BEHIND = [
    "config.yaml",
    "metrics.jsonl",
    "environment.json",
    "evaluation.json",
    "samples.txt",
    "curves.png",
    "model/config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(write_run(folder))
    return folder


def test_a_run_leaves_everything_behind(finished):
    run = finished / "runs" / "tiny"
    for name in LEFT_BEHIND:
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").iterdir())
    assert sorted(losses(finished)) == list(range(1, 13))


def test_metrics_rows_are_complete(finished):
    rows = [json.loads(line) for line in (finished / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert {"tokens", "grad_norm", "lr", "tokens_per_second", "mfu", "seconds", "aux_loss", "z_loss"} <= set(steps[0])
    assert len(steps[0]["load_max_over_mean"]) == len(steps[0]["dead_experts"]) == 2
    assert all(1.0 <= load <= 4.0 for row in steps for load in row["load_max_over_mean"])
    validations = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in validations] == [6, 12]
    assert all(row["validation_bits_per_byte"] > 0 for row in validations)


def test_the_portable_model_scores_what_the_run_reported(finished):
    run = finished / "runs" / "tiny"
    reported = json.loads((run / "evaluation.json").read_text())
    held_out = Shards.open(finished / "dataset", "val", tokenizer_sha256=Tokenizer.load(run / "model").sha256)
    again = bits_per_byte(grist_model.load(run / "model"), held_out, sequence_length=32)
    assert again == pytest.approx(reported, rel=1e-5)
    assert reported["loss"] < 5.5, "an untrained model has ln 300 = 5.7 nats a token"


def test_running_again_after_the_end_changes_nothing(finished):
    metrics = finished / "runs" / "tiny" / "metrics.jsonl"
    before, rows = losses(finished), metrics.read_text().count("\n")
    again = train(finished / "run.yaml")
    assert "resuming at step 12" in again.stderr
    assert losses(finished) == before
    assert metrics.read_text().count("\n") == rows


def test_wait_for_signal_then_go_on(tmp_path):
    run = write_run(tmp_path, steps=400, checkpoint={"every": 0}, evaluate={"every": 0})
    process = subprocess.Popen(
        command(run), env=environment(), cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 5, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == ExitCode.STOPPED, said[-2000:]
    assert "SIGTERM: saved step" in said
    reached = max(losses(tmp_path))
    assert 5 <= reached < 400
    resumed = train(run, "--stop_at", str(reached + 3))
    assert f"resuming at step {reached}" in resumed.stderr
    assert sorted(losses(tmp_path)) == list(range(1, reached + 4))


def wait_until(condition, process: subprocess.Popen, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"the process ended early with {process.returncode}"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def test_kill_during_a_checkpoint_write_loses_only_that_checkpoint(tmp_path):
    run = write_run(tmp_path, steps=400, checkpoint={"every": 4}, evaluate={"every": 0})
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    process = subprocess.Popen(
        command(run), env=environment(), cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )

    def half_written() -> bool:
        return (checkpoints / "step-8").is_dir() and any(checkpoints.glob(".step-*.partial"))

    wait_until(half_written, process)
    process.kill()
    process.wait()
    valid = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))
    resumed = train(run, "--stop_at", str(valid + 2))
    assert f"resuming at step {valid}" in resumed.stderr
    assert not list(checkpoints.glob(".step-*.partial"))
    assert sorted(losses(tmp_path)) == list(range(1, valid + 3))


def test_resolved_config_reproduces_the_run(finished, tmp_path):
    config = yaml.safe_load((finished / "runs/tiny/config.yaml").read_text())
    config["out"] = str(tmp_path / "runs")
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config))
    train(again)
    assert losses(tmp_path) == losses(finished)


@pytest.mark.clients
def test_transformers_loads_the_run_with_the_same_logits_and_greedy_text(finished):
    transformers = pytest.importorskip("transformers")
    directory = finished / "runs" / "tiny" / "model"
    ours, tokenizer = grist_model.load(directory), Tokenizer.load(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    text = "the miller carries the grain to the mill — naïve 🥞"
    ids = tokenizer.encode(text)
    assert their_tokenizer.encode(text, add_special_tokens=False) == ids
    prompt = torch.tensor([ids[:24]])
    with torch.no_grad():
        difference = (theirs(prompt).logits - ours(prompt)).abs().max().item()
    assert difference < 1e-4

    mine = grist_model.generate(ours, ids[:6], max_new_tokens=12, temperature=0.0)
    full = theirs.generate(torch.tensor([ids[:6]]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert their_tokenizer.decode(full[0, 6:]) == tokenizer.decode(mine)


def test_without_a_validation_split_the_run_says_what_it_cannot_do(tmp_path):
    run = write_run(tmp_path, steps=6)
    plain = train(run, "--data.prepare.val_fraction", "0", "--sample.prompts", "[]")
    assert "no validation split: nothing will be evaluated" in plain.stderr
    assert not (tmp_path / "runs/tiny/evaluation.json").exists()
    best = train(run, "--data.prepare.val_fraction", "0", "--checkpoint.portable", "best", check=False)
    assert best.returncode == 1
    assert "error: checkpoint.portable=best needs a validation split" in best.stderr
