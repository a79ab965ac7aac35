"""How kernels are launched: block sizes and warps come from frozen tables, and nothing is tuned while a program runs.

An op keeps its table in <op>/launch_table.json: one row for each kernel, architecture, type and size bucket. What has no row
(an architecture nobody tuned) gets what the op's own formula says. `python -m grist_tools.tune_kernels` writes the tables;
nothing else does. The reasons: tuning at run time costs minutes, lets the ranks of one job disagree, and picks a configuration
for whatever size came first.

Every launch goes through `run`, which is where the tests count, check and record launches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

Config = Mapping[str, int]  # block sizes by the kernel's own names, num_warps, num_stages

# Shared memory a program may have, in bytes (CUDA Programming Guide, compute capabilities; the MI300 ISA's LDS). Triton
# compiles beyond it without a word, and only the launch fails.
SHARED_MEMORY_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
ARCHITECTURES = tuple(SHARED_MEMORY_BYTES)
# float16 is measured, and launched, as bfloat16: the same bytes through the same units.
TABLE_DTYPE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "bfloat16"}


@dataclass(frozen=True)
class Target:
    """What a launch is chosen for: "sm_90" or "gfx942", and how many multiprocessors (compute units) there are."""

    architecture: str
    processors: int

    @property
    def lanes(self) -> int:
        """Threads of a warp; AMD's wavefronts have 64."""
        return 64 if self.architecture.startswith("gfx9") else 32


# Triton's interpreter runs the choices for an H100; few processors, so that a program gets several blocks even in a test.
INTERPRETER = Target("sm_90", 4)
_assumed: Target | None = None
_forced: dict[tuple[str, str], Config] = {}


def target(device: torch.device) -> Target:
    """What to launch for on a device; on a CPU or meta device, what the interpreter or a recorder assumes."""
    if _assumed is not None:
        return _assumed
    return _gpu(device) if device.type == "cuda" else INTERPRETER


@cache
def _gpu(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Target(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Target(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


@contextmanager
def assuming(new: Target) -> Iterator[None]:
    """Choose launches for this target, whatever the device is (ahead-of-time builds, tests). Not thread-safe."""
    global _assumed
    before, _assumed = _assumed, new
    try:
        yield
    finally:
        _assumed = before


@cache
def config(
    op: str, kernel: str, where: Target, dtype: torch.dtype, size: int, formula: Callable[..., Config]
) -> Config:
    """The launch of an op's kernel: the table's row for this target, type and size bucket, else formula(where, dtype, size)."""
    if (op, kernel) in _forced:
        return _forced[op, kernel]
    row = _rows(op).get((kernel, where.architecture, TABLE_DTYPE[dtype], size))
    return formula(where, dtype, size) if row is None else row


@contextmanager
def forcing(op: str, kernel: str, forced: Config) -> Iterator[None]:
    """Launch a kernel with this configuration (the tuner's candidates). Not thread-safe."""
    _forced[op, kernel] = forced
    config.cache_clear()
    try:
        yield
    finally:
        del _forced[op, kernel]
        config.cache_clear()


def cdiv(count: int, size: int) -> int:
    """How many blocks of a size cover count. triton.cdiv is made for kernels, and typed as one of theirs."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def table_path(op: str) -> Path:
    return Path(__file__).parent / op / "launch_table.json"


def table(op: str) -> list[dict[str, Any]]:
    """An op's rows: kernel, architecture, dtype, size, config, and source ("formula", or what measured it and when)."""
    return json.loads(table_path(op).read_text(encoding="utf-8"))["rows"]


@cache
def _rows(op: str) -> dict[tuple[str, str, str, int], Config]:
    keys = ("kernel", "architecture", "dtype", "size")
    return {tuple(row[key] for key in keys): row["config"] for row in table(op)}  # type: ignore[misc]


def forget() -> None:
    """Read the tables again (the tuner, after it wrote one; tests)."""
    _rows.cache_clear()
    config.cache_clear()


def run(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Launch kernel[grid](*arguments, **constants) on a device. An empty grid launches nothing."""
    if 0 in grid:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device. Entering one costs more than asking which it is.
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants)
        return
    kernel[grid](*arguments, **constants)
