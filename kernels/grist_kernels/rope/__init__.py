"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from torch import Tensor

from grist_kernels import backend
from grist_kernels.rope import pytorch_fast, reference


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q (B, T, N, H) and k (B, T, K, H), or packed (T, N, H) and (T, K, H), to their positions.

    cos, sin: (T, H/2), or (B, T, H/2) for positions that differ between sequences; float32 (float64 with float64 q).
    Rotate-half pairs: element i of a head turns with element i + H/2. Any scaling of the attention logits (YaRN) is
    expected in cos and sin. Returns new tensors in the types of q and k, whatever their strides; never writes into q or k.
    Differentiable in q and k; cos and sin are constants. Su et al., "RoFormer", 2021.

    Raises ValueError if shapes or types do not fit.
    """
    _check(q, k, cos, sin)
    choice = backend.implementation("rope", q.device.type)
    if choice == "triton":
        return backend.triton_kernel("rope").rope(q, k, cos, sin)
    if choice == "pytorch" and pytorch_fast.fits(q, cos):
        return pytorch_fast.rope(q, k, cos, sin)
    return reference.rope(q, k, cos, sin)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() not in (3, 4) or k.dim() != q.dim() or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "rope: q and k must be (B, T, heads, H) or packed (T, heads, H) and differ in heads only, "
            f"but q is {tuple(q.shape)} and k is {tuple(k.shape)}"
        )
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"rope: q and k must have one floating type, but q is {q.dtype} and k is {k.dtype}")
    if q.shape[-1] % 2:
        raise ValueError(f"rope: the head width must be even to form pairs, but is {q.shape[-1]}")
    time, pairs = q.shape[-3], q.shape[-1] // 2
    expected = [(time, pairs)] + ([(q.shape[0], time, pairs)] if q.dim() == 4 else [])
    if cos.shape not in expected or sin.shape != cos.shape:
        raise ValueError(
            f"rope: cos and sin must both be {' or '.join(map(str, expected))} for q {tuple(q.shape)}, "
            f"but are {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
