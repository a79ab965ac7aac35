"""Launches of Triton kernels under watch: what a GPU would not forgive is an error, and so is what only luck makes right.

    with sanitized() as report:
        x = report.guarded(x)
        y = rms_norm(x, weight)
    assert report.launches == ["_forward_kernel"]

Inside, on top of interpreter_shim's errors: every load and store hits an element of the tensor that its pointer came from; no
element is written by one program and used by another; programs run in a random order; fresh memory is poisoned and lies
between guard zones, which are checked at the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import interpreter_shim
import numpy as np
from interpreter_accesses import Accesses
from interpreter_memory import Poison
from interpreter_shim import Program
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

Chosen = Callable[[int], Iterable[int]]


def ends(count: int) -> Chosen:
    """For sanitized(programs=...): the first and the last `count` programs of a grid."""
    return lambda programs: sorted({*range(min(count, programs)), *range(max(programs - count, 0), programs)})


@dataclass(frozen=True)
class Launch:
    """One launch, after it ran. `unwritten`: for each argument stored to, how many of its elements no program stored."""

    kernel: str
    grid: Program
    unwritten: dict[str, int]


@dataclass
class Report:
    """What happened inside `sanitized`."""

    poison: Poison
    runs: list[Launch] = field(default_factory=list)

    @property
    def launches(self) -> list[str]:
        """The names of the kernels launched, in order."""
        return [run.kernel for run in self.runs]

    @property
    def allocations(self) -> int:
        """How many new storages PyTorch's ops made so far."""
        return self.poison.allocations

    def guarded(self, tensor: Tensor, name: str = "an input", *, writable: bool = False) -> Tensor:
        """A leaf with the tensor's contents, strides and requires_grad, whose gaps and surroundings are poisoned.

        Writing there is found at the end, and so is writing the tensor itself unless it is writable.
        """
        return self.poison.guarded(tensor, name, writable)


class _Watch:
    """Implements interpreter_shim.Watcher."""

    def __init__(self, report: Report, seed: int, programs: Chosen | None) -> None:
        self.report, self.seed, self.programs = report, seed, programs
        self.grid: Program = (1, 1, 1)
        self.accesses: Accesses

    def begin(self, kernel: str, arguments: dict[str, Any], grid: Program) -> Iterable[Program]:
        self.accesses, self.grid = Accesses(kernel, arguments), grid
        count = grid[0] * grid[1] * grid[2]
        order = list(range(count) if self.programs is None else self.programs(count))
        random.Random(f"{self.seed} {len(self.report.runs)}").shuffle(order)
        return ((n % grid[0], n // grid[0] % grid[1], n // (grid[0] * grid[1])) for n in order)

    def address(self, tensor: Tensor) -> int:
        return self.accesses.address(tensor)

    def start(self, program: Program) -> None:
        x, y, z = program
        self.accesses.start(program, (z * self.grid[1] + y) * self.grid[0] + x)

    def load(self, pointers: TensorHandle, mask: np.ndarray | None) -> np.ndarray:
        return self.accesses.load(pointers, mask)

    def store(self, pointers: TensorHandle, value: np.ndarray, mask: np.ndarray | None) -> None:
        self.accesses.store(pointers, value, mask)

    def end(self) -> None:
        self.report.runs.append(Launch(self.accesses.kernel, self.grid, self.accesses.unwritten()))


@contextmanager
def sanitized(seed: int = 0, programs: Chosen | None = None) -> Iterator[Report]:
    """Watch every launch inside. `seed` orders the programs; `programs(count) -> their numbers` runs only some of a grid
    (number = x + grid_x * (y + grid_y * z)).

    Raises, from the launch: OutOfBounds, Race, MaskedLoadWithoutOther, IntegerOverflow, all of them interpreter_shim.Fault. At
    the end: interpreter_memory.Overwritten. Not nested.
    """
    interpreter_shim.install()
    if interpreter_shim.watcher is not None:
        raise RuntimeError("sanitized() is already on; it cannot be nested")
    report = Report(Poison())
    interpreter_shim.watcher = _Watch(report, seed, programs)
    try:
        with report.poison:
            yield report
    finally:
        interpreter_shim.watcher = None
    report.poison.check()
