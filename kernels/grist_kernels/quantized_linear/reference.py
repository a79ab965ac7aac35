"""The definition of a linear layer with a packed weight."""

from __future__ import annotations

from torch import Tensor

from grist_kernels.precision import upcast
from grist_kernels.quantized import PackedWeight


def quantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., I), weight (O, I), bias (O,) -> (..., O): the product with the numbers that the weight stands for."""
    wide = upcast(x)
    out = wide @ weight.dequantise(wide.dtype).T
    if bias is not None:
        out = out + upcast(bias)
    return out.to(x.dtype)
