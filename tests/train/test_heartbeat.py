"""Heartbeats: the last place, written down by itself, and never in the way of the run."""

from __future__ import annotations

import os
import socket
import time

from grist_train.heartbeat import Heartbeat, read_heartbeats


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "never came"
        time.sleep(0.005)


def test_the_file_follows_the_run(tmp_path):
    began = time.time()
    with Heartbeat(tmp_path / "heartbeats", 3, interval_s=0.01) as heart:
        first = read_heartbeats(tmp_path / "heartbeats", 4)
        assert list(first) == [3]
        assert (first[3]["step"], first[3]["phase"]) == (0, "start")
        heart.at("forward", 7)
        until(lambda: read_heartbeats(tmp_path / "heartbeats", 4)[3]["phase"] == "forward")
        there = read_heartbeats(tmp_path / "heartbeats", 4)[3]
        assert there["step"] == 7
        assert (there["rank"], there["host"], there["pid"]) == (3, socket.gethostname(), os.getpid())
        assert began - 1 < there["time"] < time.time() + 1
        until(lambda: read_heartbeats(tmp_path / "heartbeats", 4)[3]["alive"] > there["alive"])
        assert read_heartbeats(tmp_path / "heartbeats", 4)[3]["time"] == there["time"], "it did not move on"
    assert read_heartbeats(tmp_path / "heartbeats", 4)[3]["phase"] == "end"


def test_a_half_written_file_is_no_word(tmp_path):
    (tmp_path / "rank-0.json").write_text('{"rank": 0, "st')
    (tmp_path / "rank-1.json").write_text('{"rank": 1}')
    assert read_heartbeats(tmp_path, 3) == {1: {"rank": 1}}


def test_storage_that_fails_is_said_once_and_ends_nothing(tmp_path, capsys):
    (tmp_path / "heartbeats").write_text("in the way")
    with Heartbeat(tmp_path / "heartbeats", 0, interval_s=0.01) as heart:
        heart.at("data", 1)
        time.sleep(0.1)
    assert capsys.readouterr().err.count("heartbeats cannot be written") == 1


def test_a_beat_costs_next_to_nothing(tmp_path):
    heart = Heartbeat(tmp_path, 0)
    began = time.process_time()
    for i in range(1000):
        heart.at("forward", i)
    assert (time.process_time() - began) / 1000 < 50e-6
    assert not list(tmp_path.iterdir()), "nothing is written where the run waits for it"
