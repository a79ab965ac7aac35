from __future__ import annotations

import itertools
import time

import pytest

from grist_tools import quiet
from grist_tools.quiet import Usage, cores_of_others, usage, wait_until_quiet

STAT = "cpu  {user} 5 100 9999 7 1 2 3 0 0\ncpu0 1 2 3\n"


def test_busy_time_is_all_but_idle_and_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(quiet, "STAT", tmp_path / "stat")
    assert usage() is None  # not Linux
    (tmp_path / "stat").write_text(STAT.format(user=200))
    monkeypatch.setattr(quiet.os, "sysconf", lambda name: {"SC_CLK_TCK": 100}[name])
    found = usage()
    assert found is not None
    assert found.machine == pytest.approx((200 + 5 + 100 + 1 + 2 + 3) / 100)


def test_what_this_process_used_is_not_others_work():
    before = Usage(wall=10.0, machine=50.0, own=3.0)
    assert cores_of_others(before, Usage(12.0, 53.0, 5.0)) == pytest.approx(0.5)
    assert cores_of_others(before, Usage(12.0, 51.9, 5.0)) == 0  # clocks that do not agree to the last tick
    assert cores_of_others(None, before) is None
    assert cores_of_others(before, before) is None


def test_waiting_ends_with_quiet_or_with_patience(monkeypatch):
    monkeypatch.setattr(quiet, "LOOK_SECONDS", 0)
    busy = [1.0, 1.0, 0.1]
    readings = itertools.chain.from_iterable((Usage(0, 0, 0), Usage(1, cores, 0)) for cores in itertools.cycle(busy))
    monkeypatch.setattr(quiet, "usage", lambda: next(readings))
    assert wait_until_quiet(time.perf_counter() + 60)  # at the third look
    assert not wait_until_quiet(time.perf_counter() - 1)  # at the first
    monkeypatch.setattr(quiet, "usage", lambda: None)
    assert wait_until_quiet(0)  # nobody can tell
