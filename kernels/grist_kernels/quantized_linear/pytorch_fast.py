"""A linear layer with a packed weight without a GPU: some rows in C, more by PyTorch's product of some rows of the weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grist_kernels.native import linear as native
from grist_kernels.quantized import PackedWeight

# The C kernel reads the weight once for 8 rows. From 64 to 256 on (bfloat16 int8, float32 int4) unpacking it first is faster.
NATIVE_ROWS = 64
_AT_ONCE = 2**21  # weights, dequantised: 8 MB in float32, which a cache of the last level may hold


def quantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """As grist_kernels.quantized_linear."""
    rows = x.shape[:-1].numel()
    if 0 < rows <= NATIVE_ROWS and native.fits(x, weight, bias):
        return native.linear(x, weight, bias)
    outputs, inputs = weight.shape
    step = max(1, _AT_ONCE // inputs)
    parts = []
    for first in range(0, outputs, step):
        some = weight.mapped(lambda part, first=first: part[first : first + step])
        parts.append(F.linear(x, some.dequantise(x.dtype), None if bias is None else bias[first : first + step]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
