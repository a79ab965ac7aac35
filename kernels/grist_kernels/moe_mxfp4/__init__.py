"""The experts of a mixture-of-experts layer whose weights stay in MXFP4: what generation with GPT-OSS runs."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels import backend
from grist_kernels.moe import check_biases, check_routing
from grist_kernels.moe_mxfp4 import pytorch_fast, reference
from grist_kernels.moe_mxfp4.dequantise import BLOCK
from grist_kernels.swiglu import check_options

_MOST_WEIGHTS = 2**34  # of a matrix: the Triton kernel counts words of eight in 32 bits


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
    """`moe` with weights as GPT-OSS's files have them: x (T, D) -> (T, D) in x's type, accumulated in float32.

    gate_up_blocks (E, 2F, D / 32, 16) and gate_up_scales (E, 2F, D / 32), down_blocks (E, D, F / 32, 16) and down_scales
    (E, D, F / 32), all uint8: MXFP4, outputs first (grist_kernels.moe_mxfp4.dequantise has the format). Best contiguous, or
    every call copies them. The other arguments are those of `moe`, with interleaved=True for GPT-OSS.

    The weights are multiplied in x's type. bfloat16 and float32 hold every finite value of the format; in float16 scales
    from 2**-23 to 2**13 are exact, smaller ones are rounded and larger ones may become infinite. A weight whose scale is NaN
    makes NaN of the tokens that chose its expert, and of no other.

    Made for inference: the Triton kernel has no gradients, and a call that asks for them runs in plain PyTorch,
    differentiable in x, expert_weights and the biases.

    Raises ValueError if shapes, types or options do not fit, and on a CPU if an expert id is out of range; on a GPU, where
    asking would wait for the device, that token becomes NaN.
    """
    weights = (gate_up_blocks, gate_up_scales, down_blocks, down_scales)
    _check_weights(*weights)
    _check(x, expert_ids, expert_weights, gate_up_blocks, b_gate_up, b_down)
    check_options("moe_mxfp4", alpha, limit)
    if expert_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        pytorch_fast.check_ids(expert_ids, gate_up_blocks.shape[0])
    options = {"alpha": alpha, "limit": limit, "interleaved": interleaved}
    floating = (x, expert_weights, b_gate_up, b_down)
    choice = backend.implementation("moe_mxfp4", x.device.type, _cannot(gate_up_blocks, *floating))
    if choice == "triton":
        return backend.triton_kernel("moe_mxfp4").moe_mxfp4(
            x, expert_ids, expert_weights, *weights, b_gate_up, b_down, **options
        )
    if choice == "pytorch" and pytorch_fast.fits(*floating):
        return pytorch_fast.moe_mxfp4(x, expert_ids, expert_weights, *weights, b_gate_up, b_down, **options)
    return reference.moe_mxfp4(x, expert_ids, expert_weights, *weights, b_gate_up, b_down, **options)


def _cannot(gate_up_blocks: Tensor, *floating: Tensor | None) -> str | None:
    """Why the Triton kernel cannot take a call, if so."""
    given = [tensor for tensor in floating if tensor is not None]
    limit = None
    if 2 * gate_up_blocks.shape[1:].numel() >= _MOST_WEIGHTS:
        limit = f"moe_mxfp4's Triton kernel takes matrices of fewer than {_MOST_WEIGHTS} weights"
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        limit = "moe_mxfp4's Triton kernel has no gradients, and one was asked for: call it under torch.no_grad()"
    return backend.cannot_take("moe_mxfp4", *given, limit=limit)


def _check_weights(gate_up_blocks: Tensor, gate_up_scales: Tensor, down_blocks: Tensor, down_scales: Tensor) -> None:
    if gate_up_blocks.dim() != 4 or gate_up_blocks.shape[1] % (2 * BLOCK) or gate_up_blocks.shape[3] != BLOCK // 2:
        raise ValueError(
            "moe_mxfp4: gate_up_blocks must be (E, 2F, D / 32, 16) with F and D multiples of 32, "
            f"but is {tuple(gate_up_blocks.shape)}"
        )
    E, wide, in_blocks, half = gate_up_blocks.shape
    down = (E, in_blocks * BLOCK, wide // 2 // BLOCK)
    for name, tensor, shape in (
        ("gate_up_blocks", gate_up_blocks, (E, wide, in_blocks, half)),
        ("gate_up_scales", gate_up_scales, (E, wide, in_blocks)),
        ("down_blocks", down_blocks, (*down, half)),
        ("down_scales", down_scales, down),
    ):
        if tensor.shape != shape or tensor.dtype != torch.uint8:
            raise ValueError(
                f"moe_mxfp4: {name} must be {shape} uint8 to match gate_up_blocks {tuple(gate_up_blocks.shape)}, "
                f"but is {tuple(tensor.shape)} {tensor.dtype}"
            )


def _check(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up_blocks: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
) -> None:
    E, wide, D = gate_up_blocks.shape[0], gate_up_blocks.shape[1], gate_up_blocks.shape[2] * BLOCK
    if x.dim() != 2 or x.shape[1] != D or not x.is_floating_point():
        raise ValueError(
            f"moe_mxfp4: x must be (T, {D}) and floating point to match gate_up_blocks {tuple(gate_up_blocks.shape)}, "
            f"but is {tuple(x.shape)} {x.dtype}"
        )
    check_routing("moe_mxfp4", x.shape[0], expert_ids, expert_weights)
    check_biases("moe_mxfp4", x.dtype, b_gate_up=(b_gate_up, (E, wide)), b_down=(b_down, (E, D)))
