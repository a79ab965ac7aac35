"""Launch configurations of the experts with MXFP4 weights: formulas, candidates for the tuner, budgets.

Their size is the tile of rows, as in grist_kernels.grouped_matmul.launches. A weight is half a byte: blocks are long along the
input width, so that each of their rows is 64 bytes, and narrow, so that one token's four experts make programs enough.
"""

from __future__ import annotations

import torch

from grist_kernels.budget import Budget
from grist_kernels.grouped_matmul.launches import SIZES, config_of
from grist_kernels.launch import Config, Target

__all__ = ["BUDGETS", "CANDIDATES", "FORMULAS", "SIZES"]


def formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    """Few rows: deep pipelines, and several programs a multiprocessor, which decode while others wait. Many: large products."""
    if dtype == torch.float32:  # multiplied without matrix units, which would keep ten bits
        return config_of(64 if size <= 64 else 32, 32, 64 // target.lanes, 1)
    if target.lanes == 64:
        return config_of(64, 128, 4, 2) if size <= 32 else config_of(128, 64, 4 if size == 64 else 8, 1)
    if size <= 32:
        return config_of(64, 128, 4, 4)
    if size == 64:
        return config_of(128, 64, 4, 4)
    return config_of(256, 64, 8, 3) if target.architecture == "sm_90" else config_of(128, 64, 8, 3)


def candidates(target: Target, dtype: torch.dtype, size: int) -> list[Config]:
    """For the tuner: every block that might fit."""
    columns, inner = ((32, 64), (32, 64)) if dtype == torch.float32 else ((32, 64, 128, 256), (64, 128, 256))
    return [
        config_of(block_n, block_k, num_warps, stages, group)
        for block_n in columns
        for block_k in inner
        if block_n * block_k <= 16384
        for num_warps in (2, 4, 8)
        for stages in (1, 2, 3, 4, 6)
        for group in (1, 8)
    ]


FORMULAS = {"gate_up": formula, "down": formula}
CANDIDATES = {"gate_up": candidates, "down": candidates}
BUDGETS = {
    "gate_up": Budget(registers=448, float32_spilled_bytes=8, tensor_core=True),
    "down": Budget(registers=448, float32_spilled_bytes=8, tensor_core=True),
    "combine": Budget(registers=128),
    "schedule": Budget(registers=128, load_bits=32),
    "route_small": Budget(registers=128, load_bits=64),
    "count": Budget(registers=128, load_bits=64),
    "scan": Budget(registers=128, load_bits=32),
    "place": Budget(registers=128, load_bits=64),
}
