"""RMSNorm, alone or fused with the residual addition before it."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from grist_kernels import backend
from grist_kernels.rms_norm import pytorch_fast, reference


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, residual: Tensor) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Scale each row of x (..., D) to unit root mean square, then by weight (D,).

    Without a residual returns y (..., D) in x's type. With one (same shape and type as x) returns (y, new_residual),
    where new_residual = x + residual and y is its norm. The weight may have another floating type than x. Sums are
    float32. Differentiable in x, weight and residual. Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

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
    choice = backend.implementation("rms_norm", x.device.type)
    if choice == "triton":
        return backend.triton_kernel("rms_norm").rms_norm(x, weight, eps, residual)
    if choice == "pytorch" and pytorch_fast.fits(x, weight):
        return pytorch_fast.rms_norm(x, weight, eps, residual)
    return reference.rms_norm(x, weight, eps, residual)
