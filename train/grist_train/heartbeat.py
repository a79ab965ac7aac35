"""Where every rank is: `RUN/heartbeats/rank-N.json`, for people who look at a run from outside, and for the watchdog.

A file says `rank, step, phase`, `time` (when the rank came there), `alive` (when the file was written; both in seconds since
1970), `host` and `pid`. A rank that waits stays where it is while `alive` goes on; of one that was stopped, or whose machine
is gone, both stand still.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

INTERVAL_S = 5.0
# In the order of a step. The host is meant: on CUDA it may be ahead of what the device computes.
PHASES = ("start", "data", "ranks", "forward", "backward", "optimizer", "metrics", "evaluate", "checkpoint")


class Beat(NamedTuple):
    """A place in the run, and how many places there were before it."""

    number: int
    step: int
    phase: str
    time: float


class Heartbeat:
    """Notes phases as they begin, at the cost of an assignment; a thread writes the last one down every few seconds.

    Nothing is synced to the disk and nothing waits for the device. Storage that fails is said once, and ends nothing.
    """

    def __init__(self, directory: Path, rank: int, interval_s: float = INTERVAL_S) -> None:
        """directory: `RUN/heartbeats`."""
        self.directory, self.rank, self.interval_s = directory, rank, interval_s
        self.last = Beat(0, 0, PHASES[0], time.time())
        self._ended = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._write_often, name="heartbeat", daemon=True)

    def at(self, phase: str, step: int) -> None:
        """The rank begins a phase of a step."""
        self.last = Beat(self.last.number + 1, step, phase, time.time())

    def __enter__(self) -> Heartbeat:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.at("end", self.last.step)
        self._write()

    def _write_often(self) -> None:
        while not self._ended.wait(self.interval_s):
            self._write()

    def _write(self) -> None:
        row = {"rank": self.rank, "step": self.last.step, "phase": self.last.phase, "time": round(self.last.time, 3)}
        row |= {"alive": round(time.time(), 3), "host": socket.gethostname(), "pid": os.getpid()}
        path = heartbeat_path(self.directory, self.rank)
        partial = path.with_name(f".{path.name}.partial")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(row), encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            if not self._failed:
                print(f"warning: heartbeats cannot be written: {error}", file=sys.stderr)
            self._failed = True


def heartbeat_path(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank}.json"


def read_heartbeats(directory: Path, size: int) -> dict[int, dict[str, Any]]:
    """The last word of each of `size` ranks that has a file that can be read."""
    found = {}
    for rank in range(size):
        try:
            found[rank] = json.loads(heartbeat_path(directory, rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there yet, or storage that fails: the reader says that nothing is known
            continue
    return found
