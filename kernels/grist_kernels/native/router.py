"""The router of a mixture-of-experts layer for a few tokens (router.c): T tokens, D model width, E experts, A active ones."""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from grist_kernels import native
from grist_kernels.native.linear import LINEAR, linear_fields

MOST_ROWS = 8
_CALL = Struct("Pqqqq" + LINEAR + "PqPP")


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """x (..., D): a few tokens, and everything is what the library reads."""
    return 0 < x.numel() <= MOST_ROWS * x.shape[-1] and native.takes(x) and native.holds(weight, bias)


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, selection_bias: Tensor | None, active: int, over_all: bool
) -> tuple[Tensor, Tensor]:
    """x (..., D), weight (E, D), bias (E,) -> ids (T, A) int64, the best first, and weights (T, A) float32.

    The choice is made on logits + selection_bias (E,) float32; weights are the softmax over the chosen ones, or with over_all
    their part of the softmax over all.
    """
    x = x.contiguous()
    T = x.numel() // x.shape[-1]
    ids, weights = x.new_empty(T, active, dtype=torch.int64), x.new_empty(T, active, dtype=torch.float32)
    native.call(
        "grist_router",
        _CALL.pack(
            x.data_ptr(), native.KINDS[x.dtype], T, active, torch.get_num_threads(), *linear_fields(weight, bias),
            0 if selection_bias is None else selection_bias.data_ptr(), over_all, ids.data_ptr(), weights.data_ptr(),
        ),
    )  # fmt: skip
    return ids, weights
