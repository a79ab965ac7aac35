"""What the project wants of its kernels: the share of a GPU's own ceiling to reach, by op and direction. Needs only torch.

From the best published share for each op on one Hopper GPU (QuACK's and Liger-Kernel's RMSNorm, Helion's RoPE,
Liger-Kernel's CuTe linear cross entropy), raised where nothing stands in the way. Attention's are what portable Triton can
hope for, above all that has been published of it (0.39 with heads of 64 and sinks, 0.53 with heads of 128) and below
FlashAttention-3 (0.60 and 0.84): an exponential costs as much time as products of 64 columns, and a deterministic backward
makes seven products for the five that are counted. Sizes below `tokens` are a matter of launches, and have none.
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
# Attention by head width. A window of so few keys that memory is the ceiling; its tiles are twice as wide as what they need.
# A mixture of experts with so many rows an expert that products are the ceiling; with fewer, reading all weights is. Beside the
# best published of portable Triton (0.63 forward) and of any kernel (0.76, 0.74: SonicMoE, on one Hopper GPU).
MOE_PRODUCTS, MOE_WEIGHTS, MANY_ROWS = Target(0.65, 0.58, 4096), Target(0.55, 0.48, 4096), 512
ATTENTION = {64: Target(0.45, 0.36, 4096), 128: Target(0.60, 0.42, 4096)}
NARROW_WINDOW, MOST_NARROW = Target(0.40, 0.25, 4096), 128
# A token's elements in the argument that has them all.
_TOKENS: dict[str, Callable[[dict[str, Any]], int]] = {
    "rms_norm": lambda arguments: arguments["x"].numel() // arguments["x"].shape[-1],
    "rope": lambda arguments: arguments["q"].numel() // arguments["q"].shape[-1] // arguments["q"].shape[-2],
    "swiglu": lambda arguments: arguments["gate_up"].numel() // arguments["gate_up"].shape[-1],
    "linear_cross_entropy": lambda arguments: arguments["targets"].numel(),
    "attention": lambda arguments: arguments["q"].shape[:-2].numel(),
    "moe": lambda arguments: arguments["x"].shape[0],
}


def targets(op: str, arguments: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, float]:
    """Direction ("forward", "backward") -> share to reach; empty where the project has no target.

    Targets are for GPUs and 16-bit types.
    """
    if not device.startswith("cuda") or dtype.itemsize != 2:
        return {}
    target = {"attention": _attention, "moe": _moe}.get(op, lambda _: TARGETS.get(op))(arguments)
    if target is None or _TOKENS[op](arguments) < target.tokens:
        return {}
    return {"forward": target.forward, "backward": target.backward}


def _attention(arguments: dict[str, Any]) -> Target | None:
    """None for heads, and for windows, that the project has no target for."""
    width, window = arguments["q"].shape[-1], arguments.get("window")
    if window is not None:
        return NARROW_WINDOW if window <= MOST_NARROW and width in ATTENTION else None
    return ATTENTION.get(width)


def _moe(arguments: dict[str, Any]) -> Target:
    rows_each = arguments["expert_ids"].numel() / arguments["w_down"].shape[0]
    return MOE_PRODUCTS if rows_each >= MANY_ROWS else MOE_WEIGHTS
