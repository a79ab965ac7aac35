"""What a layer does for a few new tokens between its norms, in one call (step.c).

B batch, T new tokens, D model width, N query heads, K key/value heads, H head width, S cache slots, F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from grist_kernels import native
from grist_kernels.native.decode_attention import ATTEND, attend_fields
from grist_kernels.native.linear import LINEAR, linear_fields
from grist_kernels.native.moe import ACTIVATION, activation_fields

if TYPE_CHECKING:
    from grist_kernels.quantized import PackedWeight

MOST_ROWS = 8  # new tokens of a call: what a weight that is read once can serve
_NORM = "Pqqd"  # `Norm` of pieces.h
_STEP = Struct("PPq" + 4 * LINEAR + 2 * _NORM + "PPqqPq" + ATTEND)
_MLP = Struct("PPqqq" + 2 * LINEAR + ACTIVATION)
_NO_NORM = (0, 0, 0, 0.0)


class Projection(NamedTuple):
    """A weight (O, I), and its bias (O,) if it has one."""

    weight: Tensor | PackedWeight
    bias: Tensor | None


class Norm(NamedTuple):
    """RMSNorm over heads, weight (H,), or over all heads of a token, (heads * H,)."""

    weight: Tensor
    eps: float


class Place(NamedTuple):
    """Where the new tokens go in a layer's buffers (B, S, K, H): slots (B, T) int64, or from `first` on in every sequence.

    lengths (B,) int64 count the slots in use, the new ones included.
    """

    k_cache: Tensor
    v_cache: Tensor
    lengths: Tensor
    first: int
    slots: Tensor | None


def attention_step(
    x: Tensor,
    projections: Sequence[Projection],
    norms: tuple[Norm | None, Norm | None],
    angles: tuple[Tensor, Tensor] | None,
    place: Place,
    head_width: int,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """x (B, T, D) -> (B, T, D): queries, keys and values, their norms and rotation, into the cache, attention, and o.

    projections: those of q, k, v and o. norms: of q and k. angles: cos and sin (T, P) or (B, T, P) float32, as in `rope`.
    """
    x = x.contiguous()
    B, T, _ = x.shape
    N = projections[0].weight.shape[0] // head_width
    out = x.new_empty(B, T, projections[3].weight.shape[0])
    linears = [field for projection in projections for field in linear_fields(*projection)]
    q_norm, k_norm = map(_norm_fields, norms)
    rotation, slots = _angle_fields(angles), place.slots
    attend = attend_fields(
        0, 0, 0, (B, T, N, head_width), (0, 0, 0), place.k_cache, place.v_cache, place.lengths, window, sinks, None
    )
    native.call(
        "grist_attention_step",
        _STEP.pack(
            x.data_ptr(), out.data_ptr(), native.KINDS[x.dtype], *linears, *q_norm, *k_norm, *rotation,
            0 if slots is None else slots.data_ptr(), place.first, *attend,
        ),
    )  # fmt: skip
    return out


def _norm_fields(norm: Norm | None) -> tuple[int | float, ...]:
    if norm is None:
        return _NO_NORM
    return norm.weight.data_ptr(), native.KINDS[norm.weight.dtype], norm.weight.shape[0], norm.eps


def _angle_fields(angles: tuple[Tensor, Tensor] | None) -> tuple[int, ...]:
    if angles is None:
        return 0, 0, 0, 0
    cos, sin = angles
    return cos.data_ptr(), sin.data_ptr(), 0 if cos.dim() == 2 else cos.stride(0), cos.shape[-1]


def mlp(x: Tensor, gate_up: Projection, down: Projection, alpha: float | None, limit: float | None) -> Tensor:
    """swiglu(x @ gate_up) @ down, x (..., D), gate_up (2F, D) of [gate | up] halves, down (D, F)."""
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], down.weight.shape[0])
    native.call(
        "grist_mlp",
        _MLP.pack(
            x.data_ptr(), out.data_ptr(), native.KINDS[x.dtype], x.numel() // x.shape[-1], torch.get_num_threads(),
            *linear_fields(*gate_up), *linear_fields(*down), *activation_fields(alpha, limit, False),
        ),
    )  # fmt: skip
    return out
