"""Median times of small pieces of work, on a CPU or a GPU, and what the device can do at best. Needs only torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

FLUSH_BYTES = (
    256 * 2**20
)  # larger than any GPU's cache, and long enough to write that the host gets ahead of the device
WARMUP = 3
FEWEST, MOST = 5, 1000  # timed repetitions

# Large enough that a ceiling is the device's and not a launch's: bytes copied, and rows of a square matrix product.
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
MATMUL_ROWS = {"cpu": 1024, "cuda": 8192}


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
    """Time `work` repeatedly for about `budget_ms`, after a warm-up.

    On CUDA with events on the device, and with the cache overwritten before each call; elsewhere with the host's clock.
    """
    for _ in range(WARMUP):
        work()
    if device.startswith("cuda"):
        times = _cuda_times(work, budget_ms)
    else:
        times = _host_times(work, budget_ms)
    cuts = quantiles(times, n=5)
    return Timing(median(times), cuts[0], cuts[3], len(times))


def _host_times(work: Callable[[], Any], budget_ms: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + budget_ms / 1e3
    while len(times) < FEWEST or (time.perf_counter() < end and len(times) < MOST):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _cuda_times(work: Callable[[], Any], budget_ms: float) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    once = _event_pairs(work, flush, 2)[-1]
    return _event_pairs(work, flush, min(MOST, max(FEWEST, round(budget_ms / max(once, 1e-3)))))


def _event_pairs(work: Callable[[], Any], flush: torch.Tensor, repetitions: int) -> list[float]:
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    for start, stop in pairs:
        flush.zero_()
        start.record()
        work()
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
