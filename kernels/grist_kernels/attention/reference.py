"""Causal grouped-query attention with an optional window, sinks and packed sequences: the definition.

B batch, T time (of queries), S time (of keys), N query heads, K key/value heads, G = N / K, H head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grist_kernels.precision import upcast


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out_i = sum_j p_ij v_j, p_ij = exp(s_ij) / (exp(sink) + sum_j exp(s_ij)), s_ij = scale * q_i . k_j, visible j only."""
    packed = q.dim() == 3
    if packed:
        q, k, v = q[None], k[None], v[None]
    visible_TT = causal_mask(q.shape[1], window, cu_seqlens, q.device)
    out_BTNH, lse_BNT = masked_attention(q, k, v, visible_TT, sinks, scale)
    if packed:
        out_BTNH, lse_BNT = out_BTNH[0], lse_BNT[0]
    return (out_BTNH, lse_BNT) if return_lse else out_BTNH


def attention_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, *, block: int = 256, **options
) -> Tensor | tuple[Tensor, Tensor]:
    """attention, the same formula, with the scores of `block` queries at a time in memory instead of T: for long sequences.

    Backward computes a block's scores again. Takes the arguments of attention.
    """
    cu_seqlens, return_lse = options.get("cu_seqlens"), options.get("return_lse", False)
    sinks, scale = options.get("sinks"), options.get("scale")
    if q.dim() == 3:
        q, k, v = q[None], k[None], v[None]

    def part(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
        visible = causal_mask(k.shape[1], options.get("window"), cu_seqlens, q.device, start)
        return masked_attention(q, k, v, visible, sinks, scale)

    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, q.shape[1], block):
        end = start + block
        parts.append(
            checkpoint(part, q[:, start:end], k[:, :end], v[:, :end], sinks, start, use_reentrant=False)  # type: ignore[arg-type]
        )
    out_BTNH, lse_BNT = torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)
    if cu_seqlens is not None:
        out_BTNH, lse_BNT = out_BTNH[0], lse_BNT[0]
    return (out_BTNH, lse_BNT) if return_lse else out_BTNH


def causal_mask(
    time: int, window: int | None, cu_seqlens: Tensor | None, device: torch.device, start: int = 0
) -> Tensor:
    """(T - start, T) boolean: may query i (row, from start on) see key j (column)?"""
    i, j = torch.arange(start, time, device=device)[:, None], torch.arange(time, device=device)[None, :]
    visible = j <= i
    if window is not None:
        visible = visible & (i - j < window)
    if cu_seqlens is not None:
        document_T = torch.searchsorted(
            cu_seqlens, torch.arange(time, device=device, dtype=cu_seqlens.dtype), right=True
        )
        visible = visible & (document_T[start:, None] == document_T[None, :])
    return visible


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sinks: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """q (B, T, N, H), k and v (B, S, K, H), visible broadcastable to (B, K, G, T, S) -> out (B, T, N, H), lse (B, N, T).

    lse is the natural logarithm of the whole denominator, the sink's term included. A query that sees nothing gets zero.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q_BTKGH = upcast(q).reshape(B, T, K, N // K, H)
    s_BKGTS = torch.einsum("btkgh,bskh->bkgts", q_BTKGH, upcast(k)) * (H**-0.5 if scale is None else scale)
    s_BKGTS = s_BKGTS.masked_fill(~visible, float("-inf"))
    lse_BKGT = s_BKGTS.logsumexp(-1)
    if sinks is not None:
        lse_BKGT = torch.logaddexp(lse_BKGT, upcast(sinks).view(K, N // K, 1))
    p_BKGTS = (s_BKGTS - lse_BKGT[..., None]).exp().masked_fill(~visible, 0.0)
    out = torch.einsum("bkgts,bskh->btkgh", p_BKGTS, upcast(v)).reshape(B, T, N, H)
    return out.to(q.dtype), lse_BKGT.reshape(B, N, T)
