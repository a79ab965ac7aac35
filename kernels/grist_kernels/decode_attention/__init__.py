"""Attention of a few new tokens to a key/value cache: what generation runs."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels import backend
from grist_kernels.attention import check_heads, check_options
from grist_kernels.decode_attention import pytorch_fast, reference


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
    """q (B, T, N, H), k_cache and v_cache (B, S, K, H), lengths (B,) -> out (B, T, N, H) in q's type.

    lengths (int32 or int64) counts the valid cached keys of each sequence, those of the T new tokens included: the caller
    writes them first. Query i stands at position lengths - T + i and sees the slots 0 to that position, with window=W only
    the last W of them. Slots from lengths on may hold anything. A query at a negative position (a batch padded on the left)
    gets zero. sinks (N,), window and scale as in `attention`.

    Raises ValueError if shapes, types or options do not fit.
    """
    check_heads("decode_attention", q, k_cache, v_cache)
    check_options("decode_attention", q, window, sinks)
    if q.dim() != 4 or q.shape[0] != k_cache.shape[0]:
        raise ValueError(
            "decode_attention: q must be (B, T, N, H) and the caches (B, S, K, H) with the same B, "
            f"but are {tuple(q.shape)} and {tuple(k_cache.shape)}"
        )
    if lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"decode_attention: lengths must be ({q.shape[0]},) int32 or int64, "
            f"but is {tuple(lengths.shape)} {lengths.dtype}"
        )
    options = {"window": window, "sinks": sinks, "scale": scale}
    choice = backend.implementation("decode_attention", q.device.type)
    if choice == "triton":
        return backend.triton_kernel("decode_attention").decode_attention(q, k_cache, v_cache, lengths, **options)
    if choice == "pytorch" and pytorch_fast.fits(q):
        return pytorch_fast.decode_attention(q, k_cache, v_cache, lengths, **options)
    return reference.decode_attention(q, k_cache, v_cache, lengths, **options)
