"""Causal attention for training and prompt processing."""

from __future__ import annotations

import itertools
from typing import Literal, overload

import torch
from torch import Tensor

from grist_kernels import backend
from grist_kernels.attention import pytorch_fast, reference

MOST_HEAD_WIDTH = 256


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
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
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    """Causal grouped-query attention: q (B, T, N, H), k and v (B, T, K, H) with N a multiple of K -> out (B, T, N, H).

    Packed form: q (T, N, H), k and v (T, K, H) and cu_seqlens (number of sequences + 1,) int32 or int64, where each
    sequence starts and the last one ends (0, ..., T); sequences do not see each other, and may be empty.
    Query head n reads key head n // (N / K). All strides are welcome.

    window=W: a query sees the last W tokens, itself included (flash-attention's window_size=(W-1, 0); Hugging Face's
    sliding_window=W). None: everything before it.
    sinks (N,): learned logits that take part in the softmax denominator only, so that a row may sum to less than one
    (GPT-OSS; Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023).
    scale: of the logits; None is 1 / sqrt(H).
    return_lse: also return the natural logarithm of the softmax denominator, the sink's term included: (B, N, T), packed
    (N, T), float32 (float64 for float64 inputs).

    Differentiable in q, k, v and sinks, through out and lse. Softmax in float32; out has q's type.

    Raises ValueError if shapes, types or options do not fit.
    """
    _check(q, k, v, window, sinks, cu_seqlens)
    options = {"window": window, "sinks": sinks, "cu_seqlens": cu_seqlens, "scale": scale}
    cannot = backend.cannot_take("attention", q, *(() if sinks is None else (sinks,)), limit=kernel_limit(q, scale))
    choice = backend.implementation("attention", q.device.type, cannot)
    if choice == "triton":
        return backend.triton_kernel("attention").attention(q, k, v, return_lse=return_lse, **options)
    if choice == "pytorch" and not return_lse and pytorch_fast.fits(q):
        return pytorch_fast.attention(q, k, v, **options)
    return reference.attention(q, k, v, return_lse=return_lse, **options)


def kernel_limit(q: Tensor, scale: float | None) -> str | None:
    """Why the Triton kernels cannot take a call, if so."""
    if q.shape[-1] > MOST_HEAD_WIDTH:
        return f"attention's Triton kernel takes heads of at most {MOST_HEAD_WIDTH} columns, but q is {tuple(q.shape)}"
    if scale is not None and scale <= 0:
        return f"attention's Triton kernel takes a positive scale, but scale is {scale}"
    return None


def _check(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    check_heads("attention", q, k, v)
    if q.shape[:-2] != k.shape[:-2]:
        raise ValueError(
            "attention: q, k and v must agree in every axis but heads (for a cache longer than the queries "
            f"use decode_attention), but q is {tuple(q.shape)} and k is {tuple(k.shape)}"
        )
    check_options("attention", q, window, sinks)
    if (cu_seqlens is not None) != (q.dim() == 3):
        raise ValueError(
            "attention: cu_seqlens belongs to packed inputs (T, heads, H), and packed inputs need it, "
            f"but q is {tuple(q.shape)} and cu_seqlens is {'given' if cu_seqlens is not None else 'None'}"
        )
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q.shape[0])


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k, v are three- or four-dimensional with fitting heads, head width and type."""
    if q.dim() not in (3, 4) or k.dim() != q.dim() or k.shape != v.shape:
        raise ValueError(
            f"{op}: q, k and v must be (B, T, heads, H) or packed (T, heads, H), k and v alike, "
            f"but are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[-1] != k.shape[-1] or k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{op}: q and k need one head width, and q a multiple of k's heads, "
            f"but (heads, H) are {tuple(q.shape[-2:])} for q and {tuple(k.shape[-2:])} for k"
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"{op}: q, k and v must have one floating type, but are {q.dtype}, {k.dtype} and {v.dtype}")


def check_options(op: str, q: Tensor, window: int | None, sinks: Tensor | None) -> None:
    """Raise ValueError unless window and sinks fit."""
    if window is not None and window < 1:
        raise ValueError(f"{op}: window counts the query itself, so it must be at least 1, but is {window}")
    if sinks is not None and sinks.shape != (q.shape[-2],):
        raise ValueError(f"{op}: sinks must be ({q.shape[-2]},), one per query head, but is {tuple(sinks.shape)}")


def _check_cu_seqlens(cu_seqlens: Tensor, time: int) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "attention: cu_seqlens must be (number of sequences + 1,) int32 or int64, "
            f"but is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    # Values are checked only where that needs no synchronisation and no graph break.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != time or any(a > b for a, b in itertools.pairwise(ends)):
            raise ValueError(f"attention: cu_seqlens must rise from 0 to {time}, the packed length, but is {ends}")
