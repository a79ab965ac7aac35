"""MXFP4 as numbers: OCP Microscaling Formats (MX) Specification v1.0, 2023, sections 5.2 (E2M1), 5.4 (E8M0) and 6.3.

A weight matrix (out, in) is kept in blocks of 32 along its input width. A block is 16 bytes, each two E2M1 values with the
first in the low four bits, and one scale byte s, which means 2**(s - 127); s = 255 is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # values that share a scale
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # bit 3 is the sign


def dequantise_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks (..., out, in / 32, 16) uint8, scales (..., out, in / 32) uint8 -> (..., out, in) float32, exact.

    Values from 2**128 on, which float32 does not have, become infinite.

    Raises ValueError if shapes or types do not fit.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(
            f"dequantise_mxfp4: blocks and scales must be uint8, but are {blocks.dtype} and {scales.dtype}"
        )
    if blocks.dim() < 3 or blocks.shape[-1] != BLOCK // 2 or blocks.shape[:-1] != scales.shape:
        raise ValueError(
            "dequantise_mxfp4: blocks must be (..., out, in / 32, 16) and scales (..., out, in / 32), "
            f"but are {tuple(blocks.shape)} and {tuple(scales.shape)}"
        )
    values = torch.tensor(_E2M1 + tuple(-value for value in _E2M1), dtype=torch.float32, device=blocks.device)
    codes = torch.stack((blocks & 15, blocks >> 4), -1).int()
    found = values.index_select(0, codes.flatten()).view(*scales.shape, BLOCK)
    return (found * _powers(scales).unsqueeze(-1)).flatten(-2)


def _powers(scales: Tensor) -> Tensor:
    """2**(s - 127) as float32, made of its bits: s is the exponent's field, but 2**-127 is subnormal, and 255 is infinity."""
    bits = scales.int() << 23
    bits = bits.masked_fill(scales == 0, 1 << 22).masked_fill(scales == 255, 0x7FC00000)
    return bits.view(torch.float32)
