"""Whether other processes are using the processor while something is timed. Linux only: elsewhere nobody can tell."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

STAT = Path("/proc/stat")
QUIET_CORES = 0.15  # that others may use
LOOK_SECONDS = 0.5


class Usage(NamedTuple):
    """Seconds: by the clock, of processor time that the machine gave to anybody, and of it to this process."""

    wall: float
    machine: float
    own: float


def usage() -> Usage | None:
    """Now; None where the machine does not say."""
    try:
        line = STAT.read_text(encoding="utf-8").split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, line.split()[1:])  # proc(5)
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return Usage(time.perf_counter(), busy, time.process_time())


def cores_of_others(before: Usage | None, after: Usage | None) -> float | None:
    """How many cores other processes kept busy between two readings; None if it is not known."""
    if before is None or after is None or after.wall <= before.wall:
        return None
    return max(0.0, (after.machine - before.machine - (after.own - before.own)) / (after.wall - before.wall))


def wait_until_quiet(deadline: float) -> bool:
    """Wait for others to pause, at most until time.perf_counter() reaches `deadline`; whether they did (or nobody can tell)."""
    while True:
        before = usage()
        if before is None:
            return True
        time.sleep(LOOK_SECONDS)
        others = cores_of_others(before, usage())
        if others is None or others <= QUIET_CORES:
            return True
        if time.perf_counter() >= deadline:
            return False
