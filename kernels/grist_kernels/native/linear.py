"""Products of a few rows and a weight (linear.c). R rows, I inputs, O outputs."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grist_kernels import native
from grist_kernels.native import packed

if TYPE_CHECKING:
    from grist_kernels.quantized import PackedWeight

WEIGHT = "PqqPPqq"  # `Weight` of weights.h
LINEAR = WEIGHT + "Pqqq"
_CALL = Struct(LINEAR + "PPqqq")


def weight_fields(weight: Tensor, row_stride: int) -> tuple[int, ...]:
    return weight.data_ptr(), native.KINDS[weight.dtype], row_stride, 0, 0, 0, 0


def linear_fields(weight: Tensor | PackedWeight, bias: Tensor | None) -> tuple[int, ...]:
    """The fields of `Linear` in linear.h."""
    outputs, columns = weight.shape
    given = (0, 0) if bias is None else (bias.data_ptr(), native.KINDS[bias.dtype])
    fields = weight_fields(weight, weight.stride(0)) if isinstance(weight, Tensor) else packed.weight_fields(weight)
    return (*fields, *given, outputs, columns)


def fits(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> bool:
    """Whether the library can read all three."""
    held = native.holds(weight) if isinstance(weight, Tensor) else packed.holds(weight)
    return held and native.holds(bias) and native.takes(x)


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., I), weight (O, I), bias (O,) -> (..., O) in x's type, as F.linear; meant for a few rows."""
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    kind, rows = native.KINDS[x.dtype], x.numel() // x.shape[-1]
    fields = linear_fields(weight, bias)
    native.call("grist_linear", _CALL.pack(*fields, x.data_ptr(), out.data_ptr(), kind, rows, torch.get_num_threads()))
    return out
