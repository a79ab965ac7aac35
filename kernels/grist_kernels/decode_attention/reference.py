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
    block_table: Tensor | None = None,
) -> Tensor:
    """Query i of T stands at position lengths - T + i of its sequence and sees the slots up to there (window: the last W)."""
    if block_table is not None:
        k_cache, v_cache = (gathered(cache, block_table, lengths) for cache in (k_cache, v_cache))
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


def gathered(cache: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    """A paged cache (number of pages, page size, K, H) as (B, S, K, H): the slots of each sequence in their order."""
    used = used_pages(block_table, lengths, cache.shape[1])
    return cache[block_table.masked_fill(~used, 0)].flatten(1, 2)


def used_pages(block_table: Tensor, lengths: Tensor, page_size: int) -> Tensor:
    """Which entries of a block table (B, pages) stand for written slots; the others may hold anything."""
    first_slot = torch.arange(block_table.shape[1], device=block_table.device) * page_size
    return first_slot < lengths[:, None]
