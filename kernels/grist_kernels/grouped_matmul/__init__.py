"""The matrix products of a mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels import backend
from grist_kernels.grouped_matmul import pytorch_fast, reference


def grouped_matmul(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (R, in) sorted by expert times w (E, in, out) -> (R, out) in x's type, accumulated in float32.

    offsets (E,) int32 or int64: where each expert's rows end, so expert e owns rows offsets[e-1] to offsets[e] (expert 0
    starts at 0). Experts may be empty. bias (E, out) is added to each of its expert's rows. Rows from offsets[-1] on belong
    to nobody: they are zero in the result, bias included, and get gradient zero.

    Differentiable in x, w and bias; an empty expert's gradients are exactly zero.

    Raises ValueError if shapes or types do not fit.
    """
    _check(x, w, offsets, bias)
    choice = backend.implementation("grouped_matmul", x.device.type, backend.cannot_take("grouped_matmul", x))
    if choice == "triton":
        return backend.triton_kernel("grouped_matmul").grouped_matmul(x, w, offsets, bias)
    if choice == "pytorch":
        return pytorch_fast.grouped_matmul(x, w, offsets, bias)
    return reference.grouped_matmul(x, w, offsets, bias)


def _check(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2 or w.dim() != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"grouped_matmul: x must be (R, in) and w (E, in, out), but x is {tuple(x.shape)} and w is {tuple(w.shape)}"
        )
    if x.dtype != w.dtype or not x.is_floating_point() or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(
            "grouped_matmul: x, w and bias must have one floating type, but are "
            f"{x.dtype}, {w.dtype} and {bias.dtype if bias is not None else None}"
        )
    if offsets.shape != w.shape[:1] or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"grouped_matmul: offsets must be ({w.shape[0]},) int32 or int64, one row end per expert, "
            f"but is {tuple(offsets.shape)} {offsets.dtype}"
        )
    if bias is not None and bias.shape != (w.shape[0], w.shape[2]):
        raise ValueError(f"grouped_matmul: bias must be {(w.shape[0], w.shape[2])}, but is {tuple(bias.shape)}")
