"""The watchdog: who is named, when it ends the process, and when it does not."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from tiny_run import environment

from grist_train.guard import ExitCode
from grist_train.heartbeat import Heartbeat
from grist_train.watchdog import Watchdog, verdict


def beat(step: int, phase: str, pid: int = 100) -> dict:
    return {"step": step, "phase": phase, "time": 1000.0, "alive": 2000.0, "host": "mill", "pid": pid}


def lines_about(text: str, rank: int) -> list[str]:
    return [line for line in text.splitlines()[1:] if line.startswith(f"rank {rank} ")]


def test_a_stopped_rank_is_named_and_those_that_wait_are_not():
    beats = {0: beat(12, "ranks"), 1: beat(12, "data", pid=200), 2: beat(12, "ranks")}
    text = verdict(0, beats, {1}, 3, 30.0)
    assert text.startswith("rank 0 made no progress for 30 s (step 12, ranks, since ")
    (line,) = lines_about(text, 1)
    assert "is stopped, or its machine is gone" in line
    assert "process 200 on mill" in line
    assert not lines_about(text, 0)
    assert not lines_about(text, 2)


@pytest.mark.parametrize("late", [beat(11, "checkpoint"), beat(12, "data")])
def test_a_rank_that_is_alive_but_behind_is_named(late):
    text = verdict(0, {0: beat(12, "ranks"), 1: late}, set(), 2, 30.0)
    (line,) = lines_about(text, 1)
    assert f"rank 1 is behind: step {late['step']}, {late['phase']}" in line
    assert not lines_about(text, 0)


def test_a_rank_that_never_wrote_is_named():
    text = verdict(0, {0: beat(1, "ranks")}, set(), 2, 30.0)
    (line,) = lines_about(text, 1)
    assert "never wrote a heartbeat" in line
    assert "All ranks are alive" not in text


def test_all_at_one_place_is_the_network():
    text = verdict(1, {0: beat(12, "backward"), 1: beat(12, "backward")}, set(), 2, 30.0)
    assert "All ranks are alive and at the same place" in text


def test_one_process_and_long_phases_are_told_what_to_raise():
    assert "raise watchdog_seconds" in verdict(0, {0: beat(12, "data")}, set(), 1, 30.0)
    both = {0: beat(12, "evaluate"), 1: beat(12, "evaluate")}
    assert "If evaluate may take that long, raise watchdog_seconds" in verdict(0, both, set(), 2, 30.0)


def test_storage_that_hangs_is_not_taken_for_a_rank_that_does():
    text = verdict(0, {0: beat(12, "checkpoint"), 1: beat(12, "checkpoint")}, {0, 1}, 2, 30.0)
    assert "could not write its own heartbeat either" in text
    assert not lines_about(text, 0)


def test_progress_keeps_it_quiet(tmp_path):
    heart = Heartbeat(tmp_path, 0)
    with Watchdog(tmp_path, heart, 1, 0.5):  # which would end this very process
        for step in range(12):
            heart.at("data", step)
            time.sleep(0.1)
    assert not list(tmp_path.iterdir())


HANGS = """
import sys, time
from pathlib import Path
from grist_train.heartbeat import Heartbeat
from grist_train.watchdog import Watchdog
folder = Path(sys.argv[1])
def where_it_hangs():
    time.sleep(100)
heart = Heartbeat(folder / "heartbeats", 0, interval_s=0.05)
with heart, Watchdog(folder, heart, 1, 0.3):
    heart.at("data", 5)
    where_it_hangs()
"""


def test_a_process_that_hangs_ends_with_a_verdict(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == ExitCode.INTERNAL, done.stderr
    assert "rank 0 made no progress for 0.3 s (step 5, data" in done.stderr
    report = (tmp_path / "hang-rank-0.txt").read_text()
    assert "rank 0 made no progress" in report
    assert "in where_it_hangs" in report
    assert "flight recorder" in report or "Collectives under way" in report
