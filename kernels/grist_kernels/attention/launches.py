"""Launch configurations of the attention kernels: formulas, candidates for the tuner, budgets. H is the padded head width.

Chosen ahead of time by what the compiler makes of them (registers, spills, shared memory, unserialised products on sm_80,
sm_90, sm_100 and gfx942: kernels/README.md); what a GPU measures goes into launch_table.json.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch

from grist_kernels.budget import Budget
from grist_kernels.launch import Config, Target, next_power_of_2

SIZES = (64, 128, 256)  # head widths; narrower heads launch as 64
# A window of up to so many keys has launches of its own. A block of 64 queries and a window of 128 meet three blocks of 64
# keys, of which one needs no mask; blocks of 128 would compute a third more scores, and have fewer programs to overlap.
NARROW_WINDOW = 256
# Where the hardware copies blocks of rows by a descriptor of the tensor: mostly 20 to 60 registers fewer than by pointers.
WITH_DESCRIPTORS = ("sm_90", "sm_100")
WIDEST_DESCRIBED = 128  # heads of 256 gain nothing, and spill two registers on sm_100


def padded_width(H: int) -> int:
    """The power of two that a head is padded to inside a kernel; matrix units take 16 columns at least."""
    return max(16, next_power_of_2(H))


def size_bucket(H: int) -> int:
    return max(SIZES[0], padded_width(H))


def row_name(kernel: str, window: int | None) -> str:
    """The row of the launch table for a kernel: forward, dq and dkv, or forward_window, ... for a narrow window."""
    return kernel if window is None or window > NARROW_WINDOW else f"{kernel}_window"


def _config(BLOCK_Q: int, BLOCK_K: int, num_warps: int, num_stages: int) -> Config:
    return {"BLOCK_Q": BLOCK_Q, "BLOCK_K": BLOCK_K, "num_warps": num_warps, "num_stages": num_stages}


def _float32(target: Target, size: int) -> Config:
    """Multiplied without matrix units, which would keep ten bits: small tiles, for correctness rather than speed."""
    side = 32 if size == 64 else 16
    return _config(side, side, 256 // target.lanes, 1)


def forward_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    if dtype == torch.float32:
        return _float32(target, size)
    if target.lanes == 64:
        return _config(128, 64, 4, 1) if size <= 128 else _config(64, 32, 4, 1)
    if size == 64:
        return _config(128, 64, 8, 3)  # 128 registers on sm_90: two programs a multiprocessor
    if size == 128:
        return _config(128, 128, 8, 2) if target.architecture == "sm_90" else _config(128, 64, 8, 3)
    return _config(64, 32, 8, 2)


def dq_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    if dtype == torch.float32:
        return _float32(target, size)
    if target.lanes == 64:
        return _config(64, 64, 4, 1) if size <= 128 else _config(32, 32, 4, 1)
    if size == 64:
        return _config(128, 64, 8, 2)
    if size == 128:
        return _config(64, 32, 4, 2) if target.architecture == "sm_80" else _config(64, 64, 4, 2)
    return _config(32, 32, 4, 1)


def dkv_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    if dtype == torch.float32:
        return _float32(target, size)
    if target.lanes == 64:
        return _config(64, 64, 4, 1) if size == 64 else _config(32, 64, 4, 1) if size == 128 else _config(32, 32, 4, 1)
    if size == 64:
        return _config(64, 128, 8, 2)
    if size == 128:
        tiles = {"sm_80": _config(64, 64, 8, 2), "sm_100": _config(64, 128, 8, 2)}
        return tiles.get(target.architecture, _config(32, 128, 8, 3))
    return _config(32, 32, 8, 1)


def forward_window_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    if dtype == torch.float32 or size == 256:
        return forward_formula(target, dtype, size)
    return _config(64, 64, 4, 1 if target.lanes == 64 else 2)


def dq_window_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    if dtype == torch.float32 or size == 256 or target.lanes == 64:
        return dq_formula(target, dtype, size)
    return _config(64, 32, 4, 2) if target.architecture == "sm_80" else _config(64, 64, 4, 2)


def dkv_window_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    """Stages where Triton 3.6 or 3.7 would spill with one less, or one more."""
    if dtype == torch.float32 or size == 256:
        return dkv_formula(target, dtype, size)
    if target.lanes == 64:
        return _config(32, 64, 4, 1)
    deeper = target.architecture == ("sm_100" if size == 64 else "sm_90")
    return _config(32, 64, 4, 3 if deeper else 2)


def _may_describe(target: Target, dtype: torch.dtype, size: int) -> bool:
    return target.architecture in WITH_DESCRIPTORS and dtype != torch.float32 and size <= WIDEST_DESCRIBED


def with_descriptors(formula: Callable[..., Config]) -> Callable[..., Config]:
    """The formula, and DESCRIPTORS: 1 to read what a loop reads through descriptors, in calls whose tensors allow it."""

    @wraps(formula)
    def of(target: Target, dtype: torch.dtype, size: int) -> Config:
        return {**formula(target, dtype, size), "DESCRIPTORS": int(_may_describe(target, dtype, size))}

    return of


def candidates(target: Target, dtype: torch.dtype, size: int) -> list[Config]:
    """For the tuner: every tile that might fit, through pointers and through descriptors."""
    if dtype == torch.float32:
        sides, warps = (16, 32, 64), (4, 8)
    else:
        sides, warps = (32, 64, 128), (4, 8)
    return [
        {**_config(queries, keys, num_warps, stages), "DESCRIPTORS": descriptors}
        for queries in sides
        for keys in sides
        for num_warps in warps
        for stages in (1, 2, 3, 4)
        for descriptors in ((0, 1) if _may_describe(target, dtype, size) else (0,))
    ]


FORMULAS = {
    "forward": with_descriptors(forward_formula),
    "forward_window": with_descriptors(forward_window_formula),
    "dq": with_descriptors(dq_formula),
    "dq_window": with_descriptors(dq_window_formula),
    "dkv": with_descriptors(dkv_formula),
    "dkv_window": with_descriptors(dkv_window_formula),
}
CANDIDATES = dict.fromkeys(FORMULAS, candidates)
# On gfx942 accumulation registers count too; NVIDIA has 255.
BUDGETS = {
    "forward": Budget(registers=448, float32_spilled_bytes=8, tensor_core=True),
    "dq": Budget(registers=448, float32_spilled_bytes=240, tensor_core=True),  # heads of 256
    # float32: heads of 256 on gfx942. 64 bits: Triton 3.6 loads lse and delta in pairs, by more instructions than all the rest.
    "dkv": Budget(registers=448, float32_spilled_bytes=8, load_bits=64, tensor_core=True),
    "bounds": Budget(registers=32, load_bits=32),
    "reduce": Budget(registers=80, load_bits=32),  # one column a head
}
