"""RMSNorm, alone or fused with the residual addition before it."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from grist_kernels import backend
from grist_kernels.rms_norm import pytorch_fast, reference

MOST_COLUMNS = 16384  # a row stays in one program's registers


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, residual: None = None, *, offset: float = 0.0) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, *, residual: Tensor, offset: float = 0.0
) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None, *, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    """Scale each row of x (..., D) to unit root mean square, then by weight (D,) + offset.

    Without a residual returns y (..., D) in x's type. With one (same shape and type as x) returns (y, new_residual),
    where new_residual = x + residual and y is its norm. The weight may have another floating type than x. Sums are
    float32. offset is 1 for models that keep weight - 1 (Gemma). Rows may be any view: heads of queries (B, T, N, H)
    with a weight (H,) are rows too. Differentiable in x, weight and residual.
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

    Raises ValueError if shapes or types do not fit.
    """
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(
            f"rms_norm: weight must be ({x.shape[-1] if x.dim() else 'D'},) to match x, "
            f"but x is {tuple(x.shape)} and weight is {tuple(weight.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"rms_norm: x must be floating point, but is {x.dtype}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: residual must have x's shape and type, {tuple(x.shape)} {x.dtype}, "
            f"but is {tuple(residual.shape)} {residual.dtype}"
        )
    cannot = backend.cannot_take("rms_norm", x, weight, limit=_limit(x))
    choice = backend.implementation("rms_norm", x.device.type, cannot)
    if choice == "triton":
        return backend.triton_kernel("rms_norm").rms_norm(x, weight, eps, residual, offset=offset)
    if choice == "pytorch" and pytorch_fast.fits(x, weight):
        return pytorch_fast.rms_norm(x, weight, eps, residual, offset=offset)
    return reference.rms_norm(x, weight, eps, residual, offset=offset)


def _limit(x: Tensor) -> str | None:
    if x.shape[-1] <= MOST_COLUMNS:
        return None
    return f"rms_norm's Triton kernel takes rows of at most {MOST_COLUMNS} columns, but x is {tuple(x.shape)}"
