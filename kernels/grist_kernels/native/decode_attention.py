"""Attention of a few new tokens to a cache (attend.c). B batch, T new tokens, S slots, N and K heads, H head width."""

from __future__ import annotations

import math
from struct import Struct

import torch
from torch import Tensor

from grist_kernels import native

MOST_TOKENS = 16
ATTEND = "6P19qd"  # `Attend` of attend.h
_CALL = Struct(ATTEND)
_EVERYTHING = 2**62


def fits(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """A few tokens, heads of neighbouring columns, caches of one type."""
    return (
        0 < q.shape[1] <= MOST_TOKENS
        and k_cache.dtype == v_cache.dtype
        and native.holds(q, k_cache, v_cache)
        and native.takes(q)
    )


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    window: int | None,
    sinks: Tensor | None,
    scale: float | None,
) -> Tensor:
    """As grist_kernels.decode_attention, without a block table."""
    out = torch.empty(q.shape, dtype=q.dtype)
    lengths = lengths.long().contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    given = (q.data_ptr(), out.data_ptr(), native.KINDS[q.dtype], q.shape, q.stride()[:3])
    native.call(
        "grist_decode_attention", _CALL.pack(*attend_fields(*given, k_cache, v_cache, lengths, window, sinks, scale))
    )
    return out


def attend_fields(
    q: int, out: int, q_kind: int, shape: tuple[int, ...], q_strides: tuple[int, ...], k_cache: Tensor, v_cache: Tensor,
    lengths: Tensor, window: int | None, sinks: Tensor | None, scale: float | None,
) -> tuple[int | float, ...]:  # fmt: skip
    """The fields of `Attend`; q and out are addresses, shape is q's. lengths int64 and sinks contiguous."""
    B, T, N, H = shape
    return (
        q, k_cache.data_ptr(), v_cache.data_ptr(), out, lengths.data_ptr(), 0 if sinks is None else sinks.data_ptr(),
        q_kind, native.KINDS[k_cache.dtype], 0 if sinks is None else native.KINDS[sinks.dtype],
        B, T, N, k_cache.shape[2], H, *q_strides, *k_cache.stride()[:3], *v_cache.stride()[:3],
        _EVERYTHING if window is None else window, torch.get_num_threads(), 1.0 / math.sqrt(H) if scale is None else scale,
    )  # fmt: skip
