"""Launch configurations of the mixture-of-experts kernels: formulas, candidates for the tuner, budgets.

Their size is the tile of rows, as in grist_kernels.grouped_matmul.launches; one schedule of tiles serves the whole layer.
"""

from __future__ import annotations

import torch

from grist_kernels.budget import Budget
from grist_kernels.grouped_matmul.launches import SIZES, config_of, forward_candidates, forward_formula
from grist_kernels.launch import Config, Target

__all__ = ["BUDGETS", "CANDIDATES", "FORMULAS", "SIZES"]


def gate_up_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    """As a plain product; BLOCK_N columns are half gates and half ups."""
    if dtype == torch.float32:
        return config_of(64, 16, 128 // target.lanes, 1)
    if target.architecture == "sm_100" and size == 128:
        return config_of(128, 64, 8, 3)
    return forward_formula(target, dtype, size)


def d_hidden_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    """Narrower than a plain product, and finished in PARTS: beside p, the epilogue holds gate, up and both their gradients."""
    if dtype == torch.float32:
        return {**config_of(32, 16, (128 if size <= 64 else 256) // target.lanes, 1), "PARTS": 1}
    stages = 1 if target.lanes == 64 else 3
    if size == 128:
        return {**config_of(128, 64, 8, stages), "PARTS": 4}
    return {**config_of(64, 64, 4, stages), "PARTS": 2}


def d_hidden_candidates(target: Target, dtype: torch.dtype, size: int) -> list[Config]:
    plain = forward_candidates(target, dtype, size)
    parts = (1, 2) if dtype == torch.float32 else (1, 2, 4)
    return [{**config, "PARTS": count} for config in plain if config["BLOCK_K"] <= 64 for count in parts]


FORMULAS = {"gate_up": gate_up_formula, "d_hidden": d_hidden_formula}
CANDIDATES = {"gate_up": forward_candidates, "d_hidden": d_hidden_candidates}
BUDGETS = {
    "gate_up": Budget(registers=448, float32_spilled_bytes=8, tensor_core=True),
    "d_hidden": Budget(registers=448, float32_spilled_bytes=8, tensor_core=True),
    "combine": Budget(registers=128),
    "d_weights": Budget(registers=128, load_bits=32),  # without biases only sums are read
    "forward": Budget(registers=448, float32_spilled_bytes=8, tensor_core=True),
    "outer": Budget(registers=448, tensor_core=True),
    "segment_sum": Budget(registers=128),
    "schedule": Budget(registers=128, load_bits=32),
    "route_small": Budget(registers=128, load_bits=64),
    "count": Budget(registers=128, load_bits=64),
    "scan": Budget(registers=128, load_bits=32),
    "place": Budget(registers=128, load_bits=64),
}
