"""Attention of new tokens to a key/value cache. B batch, T new tokens, S cache slots, N and K heads, H head width."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels.attention.reference import masked_attention


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Query i of T stands at position lengths - T + i of its sequence and sees the slots up to there (window: the last W)."""
    slot_S = torch.arange(k_cache.shape[1], device=q.device)
    position_BT = lengths[:, None] - q.shape[1] + torch.arange(q.shape[1], device=q.device)
    distance_BTS = position_BT[:, :, None] - slot_S
    visible_BTS = distance_BTS >= 0
    if window is not None:
        visible_BTS = visible_BTS & (distance_BTS < window)
    # Unwritten slots may hold anything, NaN too, and 0 * NaN is NaN; masking the probabilities alone is not enough.
    v_written = v_cache.masked_fill((slot_S >= lengths[:, None])[:, :, None, None], 0.0)
    out, _ = masked_attention(q, k_cache, v_written, visible_BTS[:, None, None], sinks, scale)
    return out
