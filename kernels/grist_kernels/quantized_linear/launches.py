"""Launch configurations of a linear layer with a packed weight: formulas, candidates for the tuner, budgets.

Their size is the tile of rows. Few rows are a matter of memory: blocks are long along the inputs, so that each of their rows is
64 bytes or more, with several loads on the way. Many rows are a product, whose weights are decoded once a tile.
"""

from __future__ import annotations

import torch

from grist_kernels.budget import Budget
from grist_kernels.launch import Config, Target, cdiv

SIZES = (16, 64, 128)  # rows of a tile
_MOST_SHARES = 8


def tile_rows(rows: int) -> int:
    return next((size for size in SIZES if rows <= size), SIZES[-1])


def config_of(BLOCK_N: int, BLOCK_K: int, num_warps: int, num_stages: int) -> Config:
    return {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "num_warps": num_warps, "num_stages": num_stages}


def shares_of(target: Target, rows: int, outputs: int, inputs: int, block_m: int, config: Config) -> int:
    """Into how many shares the inputs are divided: as give a multiprocessor two programs, each of four blocks or more."""
    if block_m != SIZES[0]:
        return 1
    programs = cdiv(rows, block_m) * cdiv(outputs, config["BLOCK_N"])
    shares = 1
    while (
        2 * shares <= _MOST_SHARES
        and 2 * shares * programs <= 2 * target.processors
        and inputs // config["BLOCK_K"] >= 4 * 2 * shares
    ):
        shares *= 2
    return shares


def formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    if dtype == torch.float32:  # multiplied without matrix units, which would keep ten bits
        return config_of(64 if size <= 64 else 32, 32, 64 // target.lanes, 1)
    if target.lanes == 64:
        return config_of(64, 128, 4, 2) if size == 16 else config_of(128, 64, 4 if size == 64 else 8, 1)
    if size == 16:
        return config_of(64, 128, 4, 4)
    return config_of(128, 64, 4, 4) if size == 64 else config_of(128, 64, 8, 3)


def candidates(target: Target, dtype: torch.dtype, size: int) -> list[Config]:
    """For the tuner: every block that might fit."""
    columns, inner = ((32, 64), (32, 64)) if dtype == torch.float32 else ((32, 64, 128, 256), (64, 128, 256))
    return [
        config_of(block_n, block_k, num_warps, stages)
        for block_n in columns
        for block_k in inner
        if block_n * block_k <= 16384
        for num_warps in (2, 4, 8)
        for stages in (1, 2, 3, 4, 6)
    ]


FORMULAS = {"forward": formula}
CANDIDATES = {"forward": candidates}
BUDGETS = {"forward": Budget(registers=448, float32_spilled_bytes=16, tensor_core=True)}
