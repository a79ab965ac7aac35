"""What the project wants of its kernels: the share of a GPU's own ceiling to reach, by op and direction. Needs only torch.

From the best published share for each op on one Hopper GPU (QuACK's and Liger-Kernel's RMSNorm, Helion's RoPE,
Liger-Kernel's CuTe linear cross entropy), raised where nothing stands in the way. Sizes below `tokens` are a matter of
launches, and have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Target(NamedTuple):
    """Shares of the ceiling (memory or matrix products, whichever is the slower) from this many tokens on."""

    forward: float
    backward: float
    tokens: int


TARGETS = {
    "rms_norm": Target(0.92, 0.85, 8192),
    "rope": Target(0.90, 0.90, 4096),
    "swiglu": Target(0.92, 0.90, 8192),
    "linear_cross_entropy": Target(0.80, 0.85, 4096),
}
# A token's elements in the argument that has them all.
_TOKENS: dict[str, Callable[[dict[str, Any]], int]] = {
    "rms_norm": lambda arguments: arguments["x"].numel() // arguments["x"].shape[-1],
    "rope": lambda arguments: arguments["q"].numel() // arguments["q"].shape[-1] // arguments["q"].shape[-2],
    "swiglu": lambda arguments: arguments["gate_up"].numel() // arguments["gate_up"].shape[-1],
    "linear_cross_entropy": lambda arguments: arguments["targets"].numel(),
}


def targets(op: str, arguments: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, float]:
    """Direction ("forward", "backward") -> share to reach; empty where the project has no target.

    Targets are for GPUs and 16-bit types.
    """
    if op not in TARGETS or not device.startswith("cuda") or dtype.itemsize != 2:
        return {}
    target = TARGETS[op]
    if _TOKENS[op](arguments) < target.tokens:
        return {}
    return {"forward": target.forward, "backward": target.backward}
