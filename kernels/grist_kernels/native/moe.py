"""The experts of a few tokens (experts.c). T tokens, D model width, E experts, A active experts per token, F expert width."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grist_kernels import native
from grist_kernels.moe.ids import check_ids
from grist_kernels.native import packed
from grist_kernels.native.linear import WEIGHT, weight_fields

if TYPE_CHECKING:
    from grist_kernels.quantized import PackedWeight

MOST_PAIRS = 64
ACTIVATION = "qqqdd"  # `Activation` of pieces.h
_CALL = Struct("PPPP" + WEIGHT + WEIGHT + "PPqqqqqq" + ACTIVATION)


def activation_fields(alpha: float | None, limit: float | None, interleaved: bool) -> tuple[int | float, ...]:
    return (alpha is not None, limit is not None, interleaved, alpha or 0.0, limit or 0.0)


def fits(x: Tensor, expert_ids: Tensor, w_gate_up: Tensor, w_down: Tensor) -> bool:
    """A few pairs of a token and an expert: more rows of an expert than the kernel takes at once are a matrix product's."""
    return (
        0 < expert_ids.numel() <= min(MOST_PAIRS, 4 * w_down.shape[0])
        and w_gate_up.is_contiguous()
        and w_down.is_contiguous()
        and native.holds(w_gate_up, w_down)
        and native.takes(x)
    )


def fits_packed(x: Tensor, expert_ids: Tensor, gate_up: PackedWeight, down: PackedWeight) -> bool:
    """As `fits`, for packed weights (E, 2F, D) and (E, D, F)."""
    few = 0 < expert_ids.numel() <= min(MOST_PAIRS, 4 * down.shape[0])
    return few and packed.holds(gate_up) and packed.holds(down) and native.takes(x)


def _weight_fields(weight: Tensor | PackedWeight, outputs: int) -> tuple[int, ...]:
    return weight_fields(weight, outputs) if isinstance(weight, Tensor) else packed.weight_fields(weight)


def moe(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w_gate_up: Tensor | PackedWeight,
    w_down: Tensor | PackedWeight,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    *,
    alpha: float | None,
    limit: float | None,
    interleaved: bool,
) -> Tensor:
    """As grist_kernels.moe, for contiguous weights; packed ones lie outputs first."""
    check_ids(expert_ids, w_down.shape[0])
    (T, A), D = expert_ids.shape, x.shape[1]
    F = w_down.shape[1] if isinstance(w_down, Tensor) else w_down.shape[2]
    weights_fields = (*_weight_fields(w_gate_up, 2 * F), *_weight_fields(w_down, D))
    x, ids, weights = x.contiguous(), expert_ids.long().contiguous(), expert_weights.float().contiguous()
    biases = [None if bias is None else bias.contiguous() for bias in (b_gate_up, b_down)]
    out = torch.empty_like(x)
    pointers = (0 if bias is None else bias.data_ptr() for bias in biases)
    native.call(
        "grist_moe",
        _CALL.pack(
            x.data_ptr(), out.data_ptr(), ids.data_ptr(), weights.data_ptr(),
            *weights_fields, *pointers,
            native.KINDS[x.dtype], T, A, D, F, torch.get_num_threads(),
            *activation_fields(alpha, limit, interleaved),
        ),
    )  # fmt: skip
    return out
