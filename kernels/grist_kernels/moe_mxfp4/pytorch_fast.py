"""The experts with MXFP4 weights in plain PyTorch: an expert that some token chose is dequantised, used, and forgotten. A few
tokens on a CPU read the weights as they are, in C.

T tokens, D model width, E experts, A active experts per token, F expert width, R = T * A rows sorted by expert.

At most one expert's weights are there in x's type at any time. Which ones are needed must be known on the host. To
torch.compile the layer is one opaque operator, without gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grist_kernels.moe.pytorch_fast import sort_by_expert
from grist_kernels.moe_mxfp4.dequantise import dequantise_mxfp4
from grist_kernels.native import moe as native
from grist_kernels.quantized import Mxfp4Weight
from grist_kernels.swiglu.reference import swiglu


def fits(*tensors: Tensor | None) -> bool:
    """All but calls that torch.compile traces with gradients."""
    asks = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return not (asks and torch.compiler.is_compiling())


def moe_mxfp4(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    *,
    alpha: float | None,
    limit: float | None,
    interleaved: bool,
) -> Tensor:
    """As grist_kernels.moe_mxfp4."""
    gate_up, down = Mxfp4Weight(gate_up_blocks, gate_up_scales), Mxfp4Weight(down_blocks, down_scales)
    if native.fits_packed(x, expert_ids, gate_up, down):
        options = {"alpha": alpha, "limit": limit, "interleaved": interleaved}
        return native.moe(x, expert_ids, expert_weights, gate_up, down, b_gate_up, b_down, **options)
    run = torch.ops.grist.moe_mxfp4 if torch.compiler.is_compiling() else _experts
    return run(
        x, expert_ids, expert_weights, gate_up_blocks, gate_up_scales, down_blocks, down_scales, b_gate_up, b_down, alpha,
        limit, interleaved,
    )  # fmt: skip


def _experts(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up_blocks: Tensor, gate_up_scales: Tensor,
    down_blocks: Tensor, down_scales: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None, alpha: float | None,
    limit: float | None, interleaved: bool,
) -> Tensor:  # fmt: skip
    n_experts = down_blocks.shape[0]
    check_ids(expert_ids, n_experts)
    _, token_R, place_TA, ends_E = sort_by_expert(expert_ids, n_experts)
    parts = [x.new_empty(0, x.shape[1])]  # so that there is something to put together where there is no token
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        if end > start:
            h = _linear(x[token_R[start:end]], gate_up_blocks[e], gate_up_scales[e], b_gate_up, e)
            act = swiglu(h, alpha=alpha, limit=limit, interleaved=interleaved)
            parts.append(_linear(act, down_blocks[e], down_scales[e], b_down, e))
        start = end
    y_TAD = torch.cat(parts)[place_TA]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (y_TAD.to(wide) * expert_weights.to(wide).unsqueeze(-1)).sum(1).to(x.dtype)


def _linear(x: Tensor, blocks: Tensor, scales: Tensor, bias: Tensor | None, e: int) -> Tensor:
    return F.linear(x, dequantise_mxfp4(blocks, scales).to(x.dtype), None if bias is None else bias[e])


def check_ids(expert_ids: Tensor, n_experts: int) -> None:
    """Raises ValueError if one is no expert's. Waits for the device."""
    if expert_ids.numel() == 0:
        return
    low, high = (int(value) for value in expert_ids.aminmax())
    if low < 0 or high >= n_experts:
        raise ValueError(
            f"moe_mxfp4: expert_ids must be in [0, {n_experts}), one of the weights' experts, but range from {low} to {high}"
        )


@torch.library.custom_op("grist::moe_mxfp4", mutates_args=())
def _op(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up_blocks: Tensor, gate_up_scales: Tensor,
    down_blocks: Tensor, down_scales: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None, alpha: float | None,
    limit: float | None, interleaved: bool,
) -> Tensor:  # fmt: skip
    return _experts(
        x, expert_ids, expert_weights, gate_up_blocks, gate_up_scales, down_blocks, down_scales, b_gate_up, b_down, alpha,
        limit, interleaved,
    )  # fmt: skip


@_op.register_fake
def _(x, *_):
    return x.new_empty(x.shape)
