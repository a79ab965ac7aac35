"""Faults that happen to long runs, done to a short one: it goes on to the losses of a run that nothing happened to, or ends
with a verdict and an exit code.

GRIST_FAULT_SEEDS=20 kills twenty runs at random steps instead of one.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import ROOT, command, environment, losses, train, write_run

from grist_train.guard import ExitCode

STEPS, EVERY = 40, 5
KILLS = int(os.environ.get("GRIST_FAULT_SEEDS", "1"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of run.yaml, with a run `tiny` on two ranks that nothing happened to, up to STEPS: what a run does at its
    end (held-out figures, the portable model) is not what is tested."""
    folder = tmp_path_factory.mktemp("faults")
    config = write_run(folder, steps=STEPS + 1, stop_at=STEPS, checkpoint={"every": EVERY}, evaluate={"every": 0})
    train(config, processes=2)
    return folder


class Running:
    """A run on two ranks under train/launch/torchrun.py, which restarts it twice."""

    def __init__(self, folder: Path, name: str, *overrides: str) -> None:
        self.run = folder / "runs" / name
        words = command(folder / "run.yaml", "--name", name, *overrides)
        launcher = [str(ROOT / "train/launch/torchrun.py"), "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
        self.process = subprocess.Popen(
            [words[0], *launcher, *words[1:]],
            env=environment(),
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_step(self, step: int) -> None:
        metrics = self.run / "metrics.jsonl"
        self.wait(lambda: metrics.is_file() and metrics.read_text().count("\n") >= step)

    def wait(self, condition: Callable[[], bool], timeout_s: float = 300.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"ended early: {self.end()[-4000:]}"
            assert time.monotonic() < deadline, "timed out"
            time.sleep(0.005)

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(json.loads((self.run / f"heartbeats/rank-{rank}.json").read_text())["pid"], number)

    def end(self) -> str:
        """What it said, once it has ended."""
        return self.process.communicate(timeout=400)[1]


def resumed_at(said: str) -> int:
    (step,) = re.findall(r"resuming at step (\d+) of", said)
    return int(step)


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_rank_is_killed_at_a_random_step_and_the_run_goes_on_by_itself(undisturbed, seed):
    draw = random.Random(seed)
    step, rank = draw.randint(1, STEPS - 10), draw.randint(0, 1)
    running = Running(undisturbed, f"killed-{seed}")
    running.wait_for_step(step)
    running.send(rank, signal.SIGKILL)
    said = running.end()
    assert running.process.returncode == 0, said[-4000:]
    assert losses(undisturbed, f"killed-{seed}") == losses(undisturbed)
    if step > 2 * EVERY:  # the last interval may be lost, and the checkpoint that was being written then
        assert resumed_at(said) >= step - 2 * EVERY


def test_a_rank_that_hangs_is_named_and_the_run_goes_on_by_itself(undisturbed):
    running = Running(undisturbed, "hung", "--watchdog_seconds", "5")
    running.wait_for_step(EVERY + 2)
    running.send(1, signal.SIGSTOP)
    report = running.run / "hang-rank-0.txt"
    running.wait(lambda: report.is_file() and "Threads of this process" in report.read_text())
    stopped = json.loads((running.run / "heartbeats/rank-1.json").read_text())
    running.send(1, signal.SIGCONT)  # torchrun would wait half a minute before it kills what does not end
    said = running.end()
    assert running.process.returncode == 0, said[-4000:]
    assert losses(undisturbed, "hung") == losses(undisturbed)
    text = report.read_text()
    assert "rank 0 made no progress for 5 s" in text
    assert f"rank 1 is stopped, or its machine is gone: its heartbeat stands still (step {stopped['step']}" in text
    assert f"process {stopped['pid']} on {stopped['host']}" in text
    assert "sum_on_host" in text or "all_reduce" in text or "backward" in text, "what its own threads were doing"


def test_a_signal_to_the_launcher_saves_and_says_that_the_run_can_go_on(undisturbed):
    running = Running(undisturbed, "told")
    running.wait_for_step(12)
    running.process.send_signal(signal.SIGTERM)
    said = running.end()
    assert running.process.returncode == ExitCode.STOPPED, said[-4000:]
    reached = max(losses(undisturbed, "told"))
    assert f"SIGTERM: saved step {reached} of" in said
    again = train(undisturbed / "run.yaml", "--name", "told", processes=2)
    assert resumed_at(again.stderr) == reached
    assert losses(undisturbed, "told") == losses(undisturbed)


def test_no_time_to_save_then_damaged_files_then_no_room(undisturbed):
    """One process, one fault after the other; each leaves what the next part of the run goes on from."""
    config, run = undisturbed / "run.yaml", undisturbed / "runs" / "unlucky"
    options = ("--name", "unlucky", "--checkpoint.keep_last", "9")
    saved = run / "checkpoints"

    process = subprocess.Popen(
        command(config, *options, "--checkpoint.deadline_seconds", "0.001", "--checkpoint.asynchronous", "false"),
        env=environment(),
        cwd=undisturbed,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (saved / "step-15").is_dir():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=400)[1]
    assert process.returncode == ExitCode.DEADLINE, said[-4000:]
    assert "not saved within checkpoint.deadline_seconds 0.001" in said
    newest = max(int(path.name.removeprefix("step-")) for path in saved.glob("step-*"))
    assert newest % EVERY == 0, "nothing was saved at the signal"

    torn = next((saved / f"step-{newest}").glob("*.distcp"))
    os.truncate(torn, torn.stat().st_size // 2)
    flipped = next((saved / f"step-{newest - EVERY}").glob("*.distcp"))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)

    limit = flipped.stat().st_size // 2  # no file may be larger: a disk that is full in the middle of writing
    process = subprocess.Popen(
        command(config, *options, "--checkpoint.max_failures", "2"),
        env=environment(),
        cwd=undisturbed,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    said = process.communicate(timeout=400)[1]
    whole = newest - 2 * EVERY
    assert process.returncode == ExitCode.STORAGE, said[-4000:]
    assert f"step-{newest} is damaged: {torn.name}: has {limit} bytes" in said
    assert f"step-{newest - EVERY} is damaged: {flipped.name}: its bytes are not those that were written" in said
    assert resumed_at(said) == whole
    assert f"checkpoint step-{newest - EVERY} could not be written" in said
    assert f"checkpoint step-{newest} could not be written" in said
    assert max(losses(undisturbed, "unlucky")) >= newest, "training goes on after the first failure"
    assert sorted(path.name for path in saved.glob("damaged-*")) == sorted(
        [f"damaged-step-{newest - EVERY}", f"damaged-step-{newest}"]
    )

    again = train(config, *options)
    assert resumed_at(again.stderr) == whole
    train(config, "--name", "alone")
    assert losses(undisturbed, "unlucky") == losses(undisturbed, "alone")
