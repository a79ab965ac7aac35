"""Mixture of experts with MXFP4 weights: the definition. T tokens, D model width, E experts, A active, F their width."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels.moe.reference import moe
from grist_kernels.moe_mxfp4.dequantise import dequantise_mxfp4
from grist_kernels.precision import upcast


def moe_mxfp4(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    """As `moe` with the dequantised weights, one expert at a time.

    An expert reads every token, but counts for those that chose it alone: another one's weights may be NaN.
    """
    wide = upcast(x)
    only_T1 = torch.zeros_like(expert_ids[:, :1])
    out = torch.zeros_like(wide)
    for e in range(down_blocks.shape[0]):
        chosen_TA = expert_ids == e
        weight_T1 = expert_weights.to(wide.dtype).masked_fill(~chosen_TA, 0.0).sum(1, keepdim=True)
        w_gate_up, w_down = (
            dequantise_mxfp4(blocks[e], scales[e]).to(wide.dtype).T[None]
            for blocks, scales in ((gate_up_blocks, gate_up_scales), (down_blocks, down_scales))
        )
        biases = [None if bias is None else bias[e : e + 1] for bias in (b_gate_up, b_down)]
        y_TD = moe(
            wide, only_T1, weight_T1, w_gate_up, w_down, *biases, alpha=alpha, limit=limit, interleaved=interleaved
        )
        out = out + y_TD.masked_fill(~chosen_TA.any(1, keepdim=True), 0.0)
    return out.to(x.dtype)
