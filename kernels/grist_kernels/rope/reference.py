"""Rotary position embedding (Su et al., 2021), rotate-half pairs as Llama and GPT-OSS. T time, H head width."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels.precision import upcast


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the pair (x[i], x[i + H/2]) of every head by the angle whose cosine and sine are cos[..., i], sin[..., i]."""
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., T, heads, H); cos, sin (T, H/2) or (B, T, H/2)."""
    cos, sin = upcast(cos).unsqueeze(-2), upcast(sin).unsqueeze(-2)  # the same for every head
    x1, x2 = upcast(x).chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
