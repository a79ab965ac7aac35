"""Attention to a cache on a CPU: the reference on the part of the cache that any query can see."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels.decode_attention import reference


def fits(q: Tensor) -> bool:
    """Eager on a CPU: reading the lengths costs no synchronisation."""
    return q.device.type == "cpu" and q.shape[0] > 0 and not torch.compiler.is_compiling()


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    window: int | None,
    sinks: Tensor | None,
    scale: float | None,
    block_table: Tensor | None,
) -> Tensor:
    """As grist_kernels.decode_attention. A cache is allocated for the longest text; most of its slots are not written yet."""
    low, high = (int(x) for x in lengths.aminmax())
    high = max(high, 1)  # an empty cache: one slot that nobody sees
    first = 0 if window is None else max(0, min(low - q.shape[1] - window + 1, high - 1))
    if block_table is None:
        k_cache, v_cache = k_cache[:, first:high], v_cache[:, first:high]
    else:
        page_size = k_cache.shape[1]
        first = first // page_size * page_size
        block_table = block_table[:, first // page_size : -(-high // page_size)]
    return reference.decode_attention(
        q, k_cache, v_cache, lengths - first, window=window, sinks=sinks, scale=scale, block_table=block_table
    )
