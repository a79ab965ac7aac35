"""Rotary position embedding (Su et al., 2021), rotate-half pairs as Llama and GPT-OSS. T time, H head width, P pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels.precision import upcast


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Turn the pair (x[i], x[i + P]) of every head by the angle whose cosine and sine are cos[..., i], sin[..., i]."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., T, heads, H); cos, sin (T, P) or (B, T, P). The columns from 2 P on stay."""
    cos, sin = upcast(cos).unsqueeze(-2), upcast(sin).unsqueeze(-2)  # the same for every head
    pairs = cos.shape[-1]
    x1, x2, rest = upcast(x).split((pairs, pairs, x.shape[-1] - 2 * pairs), dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1).to(x.dtype)
