"""When a rank makes no progress: a verdict in plain words, and an end that a launcher restarts from.

Collectives wait for the slowest rank, so one that stops makes all others wait, mostly for half an hour, and what they say then
names none of them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d

from grist_train.distributed import World
from grist_train.guard import ExitCode
from grist_train.heartbeat import INTERVAL_S, PHASES, Heartbeat, read_heartbeats

_RECORDER_S = 10.0  # after which NCCL's recorder, which takes locks, is given up


@contextlib.contextmanager
def watched(run_dir: Path, world: World, seconds: float | None) -> Iterator[Heartbeat]:
    """The heartbeat of this rank while the block runs, with a watchdog over it; seconds: None is a heartbeat alone."""
    interval_s = INTERVAL_S if seconds is None else min(INTERVAL_S, seconds / 4)
    heartbeat = Heartbeat(run_dir / "heartbeats", world.rank, interval_s)
    with heartbeat, Watchdog(run_dir, heartbeat, world.size, seconds):
        yield heartbeat


class Watchdog:
    """Ends the process with ExitCode.INTERNAL when its heartbeat has stood still for `seconds` while the `with` block runs.

    Before that it writes `RUN/hang-rank-N.txt`: who is behind, what every thread was doing, the collectives under way.

    Time in which the process itself was stopped (Ctrl-Z, a debugger) does not count.
    """

    def __init__(self, run_dir: Path, heartbeat: Heartbeat, size: int, seconds: float | None) -> None:
        """size: number of ranks. seconds: None watches nothing."""
        self._run_dir, self._heartbeat, self._size, self._seconds = run_dir, heartbeat, size, seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._seconds is not None:
            self._thread.join()

    def _watch(self) -> None:
        assert self._seconds is not None
        tick_s = min(1.0, self._seconds / 10)
        seen, idle_s, before = self._heartbeat.last.number, 0.0, time.monotonic()
        while not self._ended.wait(tick_s):
            now = time.monotonic()
            idle_s += min(now - before, 2 * tick_s)  # a longer tick means that this process was stopped
            before = now
            if self._heartbeat.last.number != seen:
                seen, idle_s = self._heartbeat.last.number, 0.0
            if idle_s >= self._seconds:
                self._judge(seen)
                seen, idle_s, before = self._heartbeat.last.number, 0.0, time.monotonic()

    def _judge(self, seen: int) -> None:
        """End the process, unless it goes on while the others are being looked at."""
        assert self._seconds is not None
        directory = self._heartbeat.directory
        first = read_heartbeats(directory, self._size)
        # Clocks of machines differ: whether a rank is alive shows in whether its file is written again.
        if self._ended.wait(2.5 * self._heartbeat.interval_s) or self._heartbeat.last.number != seen:
            return
        second = read_heartbeats(directory, self._size)
        silent = {rank for rank, beat in second.items() if beat["alive"] == first.get(rank, {}).get("alive")}
        text = verdict(self._heartbeat.rank, second, silent, self._size, self._seconds)
        path = self._run_dir / f"hang-rank-{self._heartbeat.rank}.txt"
        print(f"error: {text}\nSee {path}", file=sys.stderr, flush=True)
        try:
            _write_report(path, text)
        except OSError as error:  # storage may be what hangs
            print(f"error: {path} could not be written: {error}", file=sys.stderr, flush=True)
        os._exit(ExitCode.INTERNAL)  # an orderly end would wait for the ranks that hang


def verdict(rank: int, beats: dict[int, dict[str, Any]], silent: set[int], size: int, seconds: float) -> str:
    """Who holds up the run, in words.

    beats: last heartbeat of each rank that has one, as it is in its file. silent: ranks whose files are no longer written.
    """
    own = beats.get(rank)
    here = f" ({_place(own)})" if own else ""
    lines = [f"rank {rank} made no progress for {seconds:g} s{here}."]
    for missing in sorted(set(range(size)) - set(beats)):
        lines.append(f"rank {missing} never wrote a heartbeat: it did not start, or cannot write to the run's folder.")
    if rank in silent:
        lines.append("It could not write its own heartbeat either: storage does not answer.")
    for each in sorted(silent - {rank}):
        lines.append(
            f"rank {each} is stopped, or its machine is gone: its heartbeat stands still ({_place(beats[each])}, process "
            f"{beats[each]['pid']} on {beats[each]['host']}). The others wait for it."
        )
    alive = {each: beat for each, beat in beats.items() if each not in silent}
    furthest = max((_order(beat) for beat in alive.values()), default=(0, 0))
    behind = [each for each, beat in sorted(alive.items()) if _order(beat) < furthest]
    for each in behind:
        lines.append(
            f"rank {each} is behind: {_place(beats[each])}, process {beats[each]['pid']} on {beats[each]['host']}."
        )
    if size > 1 and len(alive) == size and not behind:
        lines.append(
            "All ranks are alive and at the same place: the network between them, a collective that they entered in another "
            "order, or storage that does not answer."
        )
    if size == 1:
        lines.append("Its threads are below. If the phase may take that long, raise watchdog_seconds.")
    elif not silent and own and own["phase"] in ("evaluate", "checkpoint"):
        lines.append(f"If {own['phase']} may take that long, raise watchdog_seconds.")
    return "\n".join(lines)


def _place(beat: dict[str, Any]) -> str:
    since = time.strftime("%H:%M:%S", time.localtime(beat["time"]))
    return f"step {beat['step']}, {beat['phase']}, since {since}"


def _order(beat: dict[str, Any]) -> tuple[int, int]:
    return beat["step"], PHASES.index(beat["phase"]) if beat["phase"] in PHASES else len(PHASES)


def _write_report(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:  # after a restart the run may hang again
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n{text}\n\nThreads of this process:\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        asking = threading.Thread(target=lambda: file.write(_collectives()), daemon=True)
        asking.start()
        asking.join(_RECORDER_S)


def _collectives() -> str:
    """The collectives of NCCL that have not ended, from its flight recorder.

    The recorder has no public door: in CUDA builds of PyTorch 2.11 to 2.13 it is this function, elsewhere there is none.
    """
    dump = getattr(_distributed_c10d, "_dump_nccl_trace_json", None)
    if dump is None:
        return "\nNCCL's flight recorder is not in this build of PyTorch.\n"
    entries = json.loads(dump(includeCollectives=True, onlyActive=True)).get("entries", [])
    lines = [
        f"{each.get('profiling_name')} number {each.get('collective_seq_id')} of {each.get('process_group')}: "
        f"{each.get('state')}, shapes {each.get('input_sizes')}\n"
        for each in entries
    ]
    return "\nCollectives under way:\n" + ("".join(lines) or "none that NCCL's flight recorder knows\n")
