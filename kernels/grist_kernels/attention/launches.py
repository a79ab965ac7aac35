"""Launch configurations of the attention kernels: formulas, candidates for the tuner, budgets. H is the padded head width.

Chosen ahead of time by what the compiler makes of them (registers, spills, shared memory, unserialised products on sm_80,
sm_90, sm_100 and gfx942: kernels/README.md); what a GPU measures goes into launch_table.json.
"""

from __future__ import annotations

import torch

from grist_kernels.budget import Budget
from grist_kernels.launch import Config, Target, next_power_of_2

SIZES = (64, 128, 256)  # head widths; narrower heads launch as 64


def padded_width(H: int) -> int:
    """The power of two that a head is padded to inside a kernel; matrix units take 16 columns at least."""
    return max(16, next_power_of_2(H))


def size_bucket(H: int) -> int:
    return max(SIZES[0], padded_width(H))


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
    return _config(64, 64, 4, 2) if size == 128 else _config(32, 32, 4, 1)


def dkv_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    if dtype == torch.float32:
        return _float32(target, size)
    if target.lanes == 64:
        return _config(64, 64, 4, 1) if size == 64 else _config(32, 64, 4, 1) if size == 128 else _config(32, 32, 4, 1)
    if size == 64:
        return _config(64, 128, 8, 2)
    if size == 128:
        return _config(64, 64, 8, 2) if target.architecture == "sm_80" else _config(32, 128, 8, 3)
    return _config(32, 32, 8, 1)


def candidates(target: Target, dtype: torch.dtype, size: int) -> list[Config]:
    """For the tuner: every tile that might fit."""
    if dtype == torch.float32:
        sides, warps = (16, 32, 64), (4, 8)
    else:
        sides, warps = (32, 64, 128), (4, 8)
    return [
        _config(queries, keys, num_warps, stages)
        for queries in sides
        for keys in sides
        for num_warps in warps
        for stages in (1, 2, 3, 4)
    ]


FORMULAS = {"forward": forward_formula, "dq": dq_formula, "dkv": dkv_formula}
CANDIDATES = {"forward": candidates, "dq": candidates, "dkv": candidates}
# On gfx942 accumulation registers count too; NVIDIA has 255.
BUDGETS = {
    "forward": Budget(registers=448, float32_spilled_bytes=8, tensor_core=True),
    "dq": Budget(registers=448, float32_spilled_bytes=240, tensor_core=True),  # heads of 256
    "dkv": Budget(registers=448, float32_spilled_bytes=8, tensor_core=True),  # heads of 256 on gfx942
    "bounds": Budget(registers=32, load_bits=32),
    "reduce": Budget(registers=80, load_bits=32),  # one column a head
}
