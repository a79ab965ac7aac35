"""Which launch of a kernel is fastest on this GPU: candidates checked, then timed against what the op's formula says."""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch

from grist_kernels import OPS, backend, launch
from grist_kernels.cases import Arguments, Case, Expected, expected, run
from grist_kernels.launch import Config
from grist_tools.bench_kernels_case import error_ratio, inputs
from grist_tools.bench_kernels_times import BY_DIFFERENCE, DIRECTIONS, Calls, calls
from grist_tools.kernel_recorder import rows_read
from grist_tools.timing import Call, alternate

MARGIN = 0.02  # of the formula's time: medians vary by about as much
CHECK_ROWS = 1000  # of the calls compared with float64; a configuration is right or wrong whatever the number


def best(formula: Config, candidates: Sequence[Config], time_ms: Callable[[Config], float]) -> tuple[Config, float]:
    """The configuration to launch, and its time over the formula's (1 for the formula itself).

    time_ms gives infinity for a candidate that cannot run or is wrong. Raises ValueError if the formula's own is one.
    """
    baseline = time_ms(formula)
    if math.isinf(baseline):
        raise ValueError(f"the formula's own configuration {dict(formula)} does not run or gives a wrong result")
    others = [candidate for candidate in candidates if candidate != formula]
    times = [time_ms(candidate) for candidate in others]
    if min(times, default=math.inf) >= (1 - MARGIN) * baseline:
        return formula, 1.0
    fastest = others[times.index(min(times))]
    # The fastest of many is also the luckiest, so both are timed once more.
    ratio = time_ms(fastest) / time_ms(formula)
    return (fastest, ratio) if ratio < 1 - MARGIN else (formula, 1.0)


@dataclass
class Bench:
    """The calls of one op, type and size: small ones to compare with float64, large ones to time."""

    op: str
    dtype: torch.dtype
    device: str
    budget_ms: float
    checks: list[tuple[Case, Arguments, dict[str, Expected]]]
    timed: list[Calls]
    wrong: int = 0  # configurations so far

    def kernels(self) -> set[str]:
        """The kernels, as launch tables call them, that a check launches."""
        with rows_read(self.op) as rows:
            for case, arguments, _ in self.checks:
                run(OPS[self.op].door, arguments, case.gradients)
        return {kernel for kernel, _ in rows}

    def time_ms(self, kernel: str, config: Config) -> float:
        """Median milliseconds of the calls that launch the kernel, added up; infinity if it does not fit or is wrong."""
        from triton.runtime.errors import OutOfResources

        with launch.forcing(self.op, kernel, config):
            try:
                worst = max(self._error(*check) for check in self.checks)
            except OutOfResources as error:
                self.say(f"{kernel} {dict(config)} does not fit: {error}")
                return math.inf
            if worst > 1:
                self.wrong += 1
                self.say(f"WRONG {kernel} {dict(config)}: error {worst:.3g} of what is allowed")
                return math.inf
            calls_with = [call for directions in self.timed if (call := _call_with(kernel, directions, self.op))]
            if not calls_with:
                raise ValueError(f"no timed call of {self.op} launches {kernel}, though a smaller one does")
            return sum(self._median_ms(call) for call in calls_with)

    def _error(self, case: Case, arguments: Arguments, wanted: dict[str, Expected]) -> float:
        return error_ratio(run(OPS[self.op].door, arguments, case.gradients), wanted)

    def _median_ms(self, call: Call) -> float:
        return alternate({self.op: call}, self.device, self.budget_ms, rounds=1)[self.op].median_ms

    def say(self, text: str) -> None:
        print(f"{self.op} {self.dtype} {text}", file=sys.stderr, flush=True)


def _call_with(kernel: str, directions: Calls, op: str) -> Call | None:
    """The shortest call that launches a kernel. What makes gradients in its forward is timed as training runs it."""
    for direction in ("forward_backward",) if op in BY_DIFFERENCE else DIRECTIONS:
        call = directions.get(direction)
        if call is None:
            continue
        if call.before is not None:
            call.before()
        with rows_read(op) as rows:
            call.work()
        if any(name == kernel for name, _ in rows):
            return call
    return None


def bench(op: str, dtype: torch.dtype, size: int, rows: int, budget_ms: float, device: str) -> Bench:
    """Make the calls of a size: CHECK_ROWS rows to compare, `rows` to time."""
    at_size = import_module(f"grist_kernels.{op}.cases").at_size
    checks, timed = [], []
    for case in at_size(size, CHECK_ROWS):
        arguments = inputs(case, dtype, device)
        checks.append((case, arguments, expected(OPS[op].reference, case, arguments)))
    for case in at_size(size, rows):
        timed.append(calls(op, OPS[op].door, inputs(case, dtype, device), case.gradients))
    return Bench(op, dtype, device, budget_ms, checks, timed)


def tune_size(these: Bench, size: int) -> list[dict[str, Any]]:
    """Rows of the launch table, without their source: the best configuration of every kernel that has candidates."""
    module = import_module(f"grist_kernels.{these.op}.triton_kernel")
    where = launch.target(torch.device(these.device))
    rows = []
    for kernel in sorted(these.kernels() & set(module.CANDIDATES)):
        formula = dict(module.FORMULAS[kernel](where, these.dtype, size))
        candidates = module.CANDIDATES[kernel](where, these.dtype, size)
        config, ratio = best(formula, candidates, partial(these.time_ms, kernel))
        dtype = launch.TABLE_DTYPE[these.dtype]
        rows.append(
            {"kernel": kernel, "architecture": where.architecture, "dtype": dtype, "size": size, "config": dict(config)}
        )
        these.say(
            f"{kernel} {size}: {'the formula' if config == formula else f'{dict(config)}, {ratio:.3f} of its time'}"
        )
    return rows


def tune(op: str, dtypes: list[str], rows: int, budget_ms: float, device: str) -> tuple[list[dict[str, Any]], int]:
    """Measured rows of an op's table for a GPU, and how many candidates gave a wrong result.

    Raises ValueError if an op has no candidates, or its formula's own configuration fails.
    """
    import triton

    module = import_module(f"grist_kernels.{op}.triton_kernel")
    if not hasattr(module, "CANDIDATES"):
        raise ValueError(f"{op} states no CANDIDATES in its triton_kernel.py: there is nothing to try")
    name = torch.cuda.get_device_name(device)
    source = f"{name}, {datetime.date.today().isoformat()}, triton {triton.__version__}"
    found, wrong = [], 0
    for dtype in dtypes:
        for size in module.SIZES:
            with backend.using("triton"):
                these = bench(op, getattr(torch, dtype), size, rows, budget_ms, device)
                found += [{**row, "source": source} for row in tune_size(these, size)]
            wrong += these.wrong
            del these
            torch.cuda.empty_cache()
    return found, wrong
