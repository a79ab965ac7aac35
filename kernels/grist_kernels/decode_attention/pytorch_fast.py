"""Attention to a cache on a CPU: the native kernel for a few new tokens. Otherwise the part of the cache that any query can
see, by PyTorch's flash kernel where all fits it.

A cache is allocated for the longest text; most of its slots are not written yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels.decode_attention import reference
from grist_kernels.native import decode_attention as native

_flash_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # as in attention/pytorch_fast.py


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
    """As grist_kernels.decode_attention."""
    if block_table is None and native.fits(q, k_cache, v_cache):
        return native.decode_attention(q, k_cache, v_cache, lengths, window=window, sinks=sinks, scale=scale)
    counts = lengths.tolist()
    low, high = min(counts), max(max(counts), 1)  # an empty cache: one slot that nobody sees
    T = q.shape[1]
    first = 0 if window is None else max(0, min(low - T - window + 1, high - 1))
    if block_table is None:
        k_cache, v_cache = k_cache[:, first:high], v_cache[:, first:high]
        if low == high and high >= T and _flash_takes(q, k_cache, v_cache):
            return _flash(q, k_cache, v_cache, window, sinks, scale)
    else:
        page_size = k_cache.shape[1]
        first = first // page_size * page_size
        block_table = block_table[:, first // page_size : -(-high // page_size)]
    return reference.decode_attention(
        q, k_cache, v_cache, lengths - first, window=window, sinks=sinks, scale=scale, block_table=block_table
    )


def _flash_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    wide = q.dtype in (torch.float32, torch.float64)  # narrower ones round inside
    return wide and q.numel() > 0 and all(x.stride(-1) == 1 for x in (q, k, v))


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None, scale: float | None) -> Tensor:
    """Every slot of k and v is written, and the last one is the last query's own. One query sees all of them."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if q.shape[1] == 1 else _mask(q, k.shape[1], window)
    out_BNTH, lse_BNT = _flash_kernel(*heads_first, 0.0, False, attn_mask=mask, scale=scale)
    if sinks is not None:
        out_BNTH = out_BNTH * torch.sigmoid(lse_BNT - sinks.to(q.dtype)[:, None]).unsqueeze(-1)
    return out_BNTH.transpose(1, 2)


def _mask(q: Tensor, slots: int, window: int | None) -> Tensor:
    """(T, slots), added to the logits: 0 where a query sees a slot, else -inf."""
    T = q.shape[1]
    distance = torch.arange(slots - T, slots)[:, None] - torch.arange(slots)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return q.new_zeros(T, slots).masked_fill_(hidden, float("-inf"))
