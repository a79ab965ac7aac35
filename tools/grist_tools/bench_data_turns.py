"""Contestants of the data benchmark, and how they are timed: checked first, then in turns, as long streams of batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple, TypeVar

import numpy as np

FEWEST = 20  # batches of a slice

Row = dict[str, Any]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Contestant:
    """A stream of batches without end.

    tokens: of one batch. draw: makes the next batch. problem: compares some batches with the files; what is wrong, or None.
    """

    tokens: int
    draw: Callable[[], Any]
    problem: Callable[[], str | None]


class Slice(NamedTuple):
    """Seconds of each of some batches, one behind the other, and of processor time for all of them, over all threads."""

    times: list[float]
    cpu_seconds: float


def race(contestants: Mapping[Name, Contestant], seconds: float, rounds: int) -> dict[Name, Row]:
    """Check every contestant, then time those that are right, `seconds` each in all; what was found, by name.

    A slice is timed as a whole, so that work which comes up once in hundreds of batches counts. Every round begins with
    another contestant than the one before.
    """
    problems = {name: contestant.problem() for name, contestant in contestants.items()}
    names = [name for name, problem in problems.items() if problem is None]
    slices: dict[Name, list[Slice]] = {name: [] for name in names}
    for name in names:
        timed(contestants[name].draw, seconds / rounds)
    for number in range(rounds):
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            slices[name].append(timed(contestants[name].draw, seconds / rounds))
    return {
        name: {"ok": True, **rates(slices[name], contestants[name].tokens)}
        if problem is None
        else {"ok": False, "wrong": problem}
        for name, problem in problems.items()
    }


def timed(draw: Callable[[], Any], seconds: float) -> Slice:
    """Batch after batch, for so long."""
    times: list[float] = []
    cpu_before, now = time.process_time(), time.perf_counter()
    end = now + seconds
    while now < end or len(times) < FEWEST:
        draw()
        before, now = now, time.perf_counter()
        times.append(now - before)
    return Slice(times, time.process_time() - cpu_before)


def rates(slices: Sequence[Slice], tokens: int) -> Row:
    """Tokens a second of each slice (median, lowest and highest), and milliseconds of a batch over all of them.

    tokens: of a batch. The rate by processor time says what a busy machine would do when it is quiet.
    """
    of_slice = [tokens * len(times) / sum(times) for times, _ in slices]
    by_cpu = [tokens * len(times) / cpu_seconds for times, cpu_seconds in slices if cpu_seconds]
    every = np.concatenate([np.asarray(times) for times, _ in slices])
    p50_ms, p99_ms = (1e3 * np.percentile(every, (50, 99))).tolist()
    return {
        "value": median(of_slice),
        "unit": "tokens/s",
        "lowest": min(of_slice),
        "highest": max(of_slice),
        "per_cpu_second": median(by_cpu) if by_cpu else None,
        "p50_ms": round(p50_ms, 6),
        "p99_ms": round(p99_ms, 6),
        "batches": len(every),
    }


def judged(row: Row, target: float, better: str = "higher") -> Row:
    """A row beside what was aimed at; better: which way values are, `higher` or `lower`."""
    if not row["ok"] or row["value"] is None:
        return {**row, "target": target}
    reached = row["value"] >= target if better == "higher" else row["value"] <= target
    return {**row, "target": target, "better": better, "reached": bool(reached)}
