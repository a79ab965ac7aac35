"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels import backend
from grist_kernels.rope import pytorch_fast, reference


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rotate q (B, T, N, H) and k (B, T, K, H), or packed (T, N, H) and (T, K, H), to their positions.

    cos, sin: (T, P), or (B, T, P) for positions that differ between sequences; float32 (float64 with float64 q). With
    positions, (T,) or (B, T) int32 or int64, they are tables (rows, P) instead, and token t takes row positions[t]: packed
    documents, caches. Rotate-half pairs: element i of a head turns with element i + P. P = H/2 rotates whole heads; with
    fewer pairs the columns from 2 P on pass unchanged (partial rotary, as GPT-NeoX). Any scaling of the attention logits
    (YaRN) is expected in cos and sin. Returns new tensors in the types of q and k, whatever their strides; never writes
    into q or k. Differentiable in q and k; cos and sin are constants. Su et al., "RoFormer", 2021.

    Raises ValueError if shapes or types do not fit. A position that the tables do not have raises IndexError on a CPU; on a
    GPU, where asking would wait for the device, its token becomes NaN.
    """
    _check(q, k)
    _check_tables(q, cos, sin, positions)
    choice = backend.implementation("rope", q.device.type, backend.cannot_take("rope", q, cos, sin))
    if choice == "triton":
        return backend.triton_kernel("rope").rope(q, k, cos, sin, positions=positions)
    if choice == "pytorch" and pytorch_fast.fits(q, cos, positions):
        return pytorch_fast.rope(q, k, cos, sin)
    return reference.rope(q, k, cos, sin, positions=positions)


def _check(q: Tensor, k: Tensor) -> None:
    if q.dim() not in (3, 4) or k.dim() != q.dim() or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "rope: q and k must be (B, T, heads, H) or packed (T, heads, H) and differ in heads only, "
            f"but q is {tuple(q.shape)} and k is {tuple(k.shape)}"
        )
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"rope: q and k must have one floating type, but q is {q.dtype} and k is {k.dtype}")
    if q.shape[-1] % 2:
        raise ValueError(f"rope: the head width must be even to form pairs, but is {q.shape[-1]}")


def _check_tables(q: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    half, leading = q.shape[-1] // 2, q.shape[:-2]
    allowed = [tuple(leading[-1:]), tuple(leading)]  # (T,), and (B, T) where there are sequences
    rows = tuple(cos.shape[:-1])
    fits = cos.dim() == 2 if positions is not None else rows in allowed
    if not fits or sin.shape != cos.shape or not 1 <= cos.shape[-1] <= half:
        expected = "(rows, P)" if positions is not None else f"{' or '.join(str((*rows, 'P')) for rows in allowed)}"
        raise ValueError(
            f"rope: cos and sin must both be {expected.replace(chr(39), '')} with 1 <= P <= {half} for q {tuple(q.shape)}, "
            f"but are {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if positions is not None and (
        tuple(positions.shape) not in allowed or positions.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"rope: positions must be int32 or int64 {' or '.join(map(str, allowed))} for q {tuple(q.shape)}, "
            f"but is {positions.dtype} {tuple(positions.shape)}"
        )
