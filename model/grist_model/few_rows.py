"""Norms and rotation for a few tokens on a CPU without gradients, a step of generation, in as few calls as there are.

B batch, T time, D model width, N query heads, K key/value heads, H head width.

They compute what the ops of the same name do, the sums in another order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from grist_model.products import eager_float32

MOST_ROWS = 32


def fits(x: Tensor) -> bool:
    """A few rows (..., D) that products.eager_float32 takes."""
    return 0 < x.numel() <= MOST_ROWS * x.shape[-1] and eager_float32(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,). F.rms_norm makes ten calls on a CPU, this makes five."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * torch.addcmul(_number(eps), length, length, value=1 / x.shape[-1]).rsqrt_()).mul_(weight)


@lru_cache
def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, T, N, H), k (B, T, K, H) and the `whole_heads` angles -> both rotated, views of one tensor."""
    heads = torch.cat((q, k), dim=2)
    swapped = heads.roll(q.shape[-1] // 2, -1)
    rotated = (heads * cos).addcmul_(swapped, sin)
    return rotated[:, :, : q.shape[2]], rotated[:, :, q.shape[2] :]


def whole_heads(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(..., T, H/2) each -> [cos | cos] and [-sin | sin], (..., T, 1, H): factors of heads and of heads with swapped halves."""
    return torch.cat((cos, cos), -1).unsqueeze(-2), torch.cat((-sin, sin), -1).unsqueeze(-2)
