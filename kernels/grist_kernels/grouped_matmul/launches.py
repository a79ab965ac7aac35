"""Launch configurations of grouped products: formulas, candidates for the tuner, budgets.

Their size is the tile of rows, which is chosen by the mean number of rows an expert has: an expert wastes half a tile on
average, so a tile as large as an expert's rows would waste half of the work.
"""

from __future__ import annotations

import torch

from grist_kernels.budget import Budget
from grist_kernels.launch import Config, Target

SIZES = (16, 32, 64, 128)  # rows of a tile
_MEAN_ROWS = {16: 0, 32: 24, 64: 48, 128: 192}  # from how many rows an expert on a size is chosen


def tile_rows(n_rows: int, n_experts: int) -> int:
    """How many rows a tile has: a power of two from 16 (what matrix units take) to 128."""
    return max(size for size in SIZES if n_rows >= _MEAN_ROWS[size] * n_experts)


def config_of(BLOCK_N: int, BLOCK_K: int, num_warps: int, num_stages: int, GROUP: int = 8) -> Config:
    return {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "GROUP": GROUP, "num_warps": num_warps, "num_stages": num_stages}


def forward_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    """Few rows: weights come from memory once and their bandwidth is the limit, so deep pipelines; many: large products."""
    if dtype == torch.float32:  # multiplied without matrix units, which would keep ten bits
        return config_of(64 if size <= 64 else 32, 16, 256 // target.lanes, 1)
    if target.lanes == 64:
        return config_of(128, 64, 4 if size <= 64 else 8, 1)
    if size <= 32:
        return {"sm_80": config_of(64, 64, 4, 3), "sm_100": config_of(64, 64, 4, 4)}.get(
            target.architecture, config_of(64, 128, 4, 4)
        )
    if size == 64:
        return config_of(128, 64, 4, 4)
    return config_of(256, 64, 8, 3) if target.architecture != "sm_80" else config_of(128, 64, 8, 3)


def outer_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    """Rows are what is summed over: few of them make short loops, whose cost is storing the result."""
    if dtype == torch.float32:
        return {**config_of(64, 16, 256 // target.lanes, 1), "BLOCK_M": 32}
    if target.lanes == 64:
        return {**config_of(128, min(64, size), 8, 1), "BLOCK_M": 128}
    if target.architecture == "sm_80":
        return {**config_of(128, min(32, size), 8, 3), "BLOCK_M": 128}
    return {**config_of(256, 64, 8, 3), "BLOCK_M": 128} if size >= 64 else {**config_of(128, 32, 8, 3), "BLOCK_M": 128}


def _blocks(target: Target, dtype: torch.dtype) -> list[Config]:
    if dtype == torch.float32:
        columns, inner, stages = (32, 64), (16, 32), (1,)
    else:
        columns, inner, stages = (64, 128, 256), (32, 64, 128), (1, 2) if target.lanes == 64 else (2, 3, 4)
    return [
        config_of(block_n, block_k, num_warps, deep)
        for block_n in columns
        for block_k in inner
        for num_warps in (4, 8)
        for deep in stages
    ]


def forward_candidates(target: Target, dtype: torch.dtype, size: int) -> list[Config]:
    """For the tuner: every block that might fit."""
    return _blocks(target, dtype)


def outer_candidates(target: Target, dtype: torch.dtype, size: int) -> list[Config]:
    rows = (32, 64) if dtype == torch.float32 else (64, 128)
    wide = [config for config in _blocks(target, dtype) if config["BLOCK_K"] <= 64]
    return [{**config, "BLOCK_M": block_m} for config in wide for block_m in rows]


FORMULAS = {"forward": forward_formula, "outer": outer_formula}
CANDIDATES = {"forward": forward_candidates, "outer": outer_candidates}
BUDGETS = {
    "forward": Budget(registers=448, float32_spilled_bytes=8, tensor_core=True),
    "outer": Budget(registers=448, tensor_core=True),
    "segment_sum": Budget(registers=128),
    "schedule": Budget(registers=128, load_bits=32),
}
