"""RMSNorm (Zhang and Sennrich, 2019), optionally after adding a residual. D model width."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels.precision import upcast


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None, *, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    """y = h / sqrt(mean(h^2) + eps) * (weight + offset) over the last axis, with h = x, or h = x + residual.

    The sum is formed in float32, normalised before it is rounded, and returned rounded to x's type as the new residual.
    """
    h = upcast(x) if residual is None else upcast(x) + upcast(residual)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * (upcast(weight) + offset)
    y = y.to(x.dtype)
    return y if residual is None else (y, h.to(x.dtype))
