"""Median times of pieces of work, side by side, and what the device can do at best. Needs only torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

# Larger than any GPU's cache, and long enough to write that the host gets ahead of the device.
FLUSH_BYTES = 256 * 2**20
WARMUP = 3
ROUNDS = 5
FEWEST, MOST = 5, 1000  # timed repetitions

# Large enough that a ceiling is the device's and not a launch's: bytes copied, and rows of a square matrix product.
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
MATMUL_ROWS = {"cpu": 1024, "cuda": 8192}


class Call(NamedTuple):
    """Work to time, and what has to run before each repetition without being timed."""

    work: Callable[[], Any]
    before: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, and between which values most calls were."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repetitions: int

    def as_json(self) -> dict[str, Any]:
        return {
            "median_ms": round(self.median_ms, 6),
            "p20_ms": round(self.p20_ms, 6),
            "p80_ms": round(self.p80_ms, 6),
            "repetitions": self.repetitions,
        }


def measure(work: Callable[[], Any], device: str, budget_ms: float = 100.0) -> Timing:
    """Time `work` repeatedly for about `budget_ms`, after a warm-up."""
    return alternate({"work": Call(work)}, device, budget_ms, rounds=1)["work"]


def alternate(
    calls: Mapping[str, Call], device: str, budget_ms: float = 100.0, rounds: int = ROUNDS
) -> dict[str, Timing]:
    """Time several calls in turns, about `budget_ms` each in all, after a warm-up: a clock that drifts hits all alike.

    Every round gives each call a slice of its budget, and begins with another call than the round before. The medians
    are over all rounds. On CUDA with events on the device, and with the cache overwritten before each repetition; elsewhere
    with the host's clock.
    """
    for call in calls.values():
        for _ in range(WARMUP):
            _once(call)
    clock = _cuda_times if device.startswith("cuda") else _host_times
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name] += clock(calls[name], budget_ms / rounds, math.ceil(FEWEST / rounds), MOST // rounds)
    return {name: _timing(found) for name, found in times.items()}


def _once(call: Call) -> None:
    if call.before is not None:
        call.before()
    call.work()


def _timing(times: list[float]) -> Timing:
    cuts = quantiles(times, n=5)
    return Timing(median(times), cuts[0], cuts[3], len(times))


def _host_times(call: Call, budget_ms: float, fewest: int, most: int) -> list[float]:
    times: list[float] = []
    _once(call)  # the slice before was another call's: its memory fills the caches
    end = time.perf_counter() + budget_ms / 1e3
    while len(times) < fewest or (time.perf_counter() < end and len(times) < most):
        if call.before is not None:
            call.before()
        start = time.perf_counter()
        call.work()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _cuda_times(call: Call, budget_ms: float, fewest: int, most: int) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    times = _event_pairs(call, flush, fewest)
    each_ms = 1e3 * (time.perf_counter() - start) / fewest
    more = min(most, round(budget_ms / each_ms)) - fewest
    return times + _event_pairs(call, flush, more)


def _event_pairs(call: Call, flush: torch.Tensor, repetitions: int) -> list[float]:
    """Milliseconds between events around the work of each repetition; none for a count of zero or less."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    for start, stop in pairs:
        if call.before is not None:
            call.before()
        flush.zero_()
        start.record()
        call.work()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in pairs]


@dataclass(frozen=True)
class Ceilings:
    """What this device reached just now: bytes a second of a copy (read and written), FLOP/s of a matrix product."""

    copy_bytes_per_second: float
    matmul_flops_per_second: float

    def floor_ms(self, n_bytes: float, flops: float) -> float:
        """The least time that this many bytes and operations could take here."""
        return 1e3 * max(n_bytes / self.copy_bytes_per_second, flops / self.matmul_flops_per_second)

    def higher(self, other: Ceilings) -> Ceilings:
        """The higher of each of two measurements of one device."""
        return Ceilings(
            max(self.copy_bytes_per_second, other.copy_bytes_per_second),
            max(self.matmul_flops_per_second, other.matmul_flops_per_second),
        )


def ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Measure them, on random numbers: zeros make a GPU faster than it is."""
    kind = torch.device(device).type
    source = torch.empty(COPY_BYTES.get(kind, COPY_BYTES["cpu"]) // 4, device=device).normal_()
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device)
    rows = MATMUL_ROWS.get(kind, MATMUL_ROWS["cpu"])
    a, b = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
    product = measure(lambda: a @ b, device)
    return Ceilings(2e3 * source.nbytes / copy.median_ms, 2e3 * rows**3 / product.median_ms)
