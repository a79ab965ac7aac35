"""The operations of a mixture-of-experts language model, each with one door and several implementations.

Every op is a folder: `__init__.py` is its door (checks, choice), `reference.py` its definition in plain PyTorch, `cases.py`
the inputs worth trying. `GRIST_KERNELS=auto|triton|reference` chooses; see `grist_kernels.backend`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from grist_kernels.attention import attention
from grist_kernels.attention.ring import ring_attention, zigzag_merge, zigzag_positions, zigzag_split
from grist_kernels.backend import describe
from grist_kernels.decode_attention import decode_attention
from grist_kernels.grouped_matmul import grouped_matmul
from grist_kernels.linear_cross_entropy import linear_cross_entropy
from grist_kernels.moe import moe
from grist_kernels.moe_mxfp4 import moe_mxfp4
from grist_kernels.quantized_linear import quantized_linear
from grist_kernels.rms_norm import rms_norm
from grist_kernels.rope import rope
from grist_kernels.swiglu import swiglu


@dataclass(frozen=True)
class Op:
    """An op as the comparison test and the benchmark see it."""

    name: str
    door: Callable

    @property
    def reference(self) -> Callable:
        """The op's definition: same arguments, same results."""
        return getattr(import_module(f"grist_kernels.{self.name}.reference"), self.name)

    @property
    def cases(self) -> list:
        """The op's `grist_kernels.cases.Case` list. Loaded when asked for: training never needs them."""
        return import_module(f"grist_kernels.{self.name}.cases").CASES


_DOORS = (
    rms_norm, rope, swiglu, attention, decode_attention, grouped_matmul, moe, moe_mxfp4, quantized_linear, linear_cross_entropy
)  # fmt: skip
OPS: dict[str, Op] = {door.__name__: Op(door.__name__, door) for door in _DOORS}

__all__ = [
    "OPS",
    "Op",
    "attention",
    "decode_attention",
    "describe",
    "grouped_matmul",
    "linear_cross_entropy",
    "moe",
    "moe_mxfp4",
    "quantized_linear",
    "ring_attention",
    "rms_norm",
    "rope",
    "swiglu",
    "zigzag_merge",
    "zigzag_positions",
    "zigzag_split",
]
