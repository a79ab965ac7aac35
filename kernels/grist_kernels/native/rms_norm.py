"""RMSNorm of a few rows (pieces.c). D model width."""

from __future__ import annotations

from struct import Struct

from torch import Tensor

from grist_kernels import native

MOST_ROWS = 32
_CALL = Struct("PqqdPPPPqq")


def fits(x: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    """A few rows: of many, PyTorch makes blocks for all threads."""
    return (
        0 < x.numel() <= MOST_ROWS * x.shape[-1]
        and (residual is None or residual.dtype == x.dtype)
        and native.holds(weight)
        and native.takes(x)
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (..., D), weight (D,) -> the norm of x + residual, and x + residual; without a residual the norm, and x."""
    x = x.contiguous()
    out = x.new_empty(x.shape)
    total = x if residual is None else x.new_empty(x.shape)
    residual = None if residual is None else residual.contiguous()
    native.call(
        "grist_rms_norm",
        _CALL.pack(
            weight.data_ptr(), native.KINDS[weight.dtype], x.shape[-1], eps, x.data_ptr(),
            0 if residual is None else residual.data_ptr(), out.data_ptr(), total.data_ptr(),
            native.KINDS[x.dtype], x.numel() // x.shape[-1],
        ),
    )  # fmt: skip
    return out, total
