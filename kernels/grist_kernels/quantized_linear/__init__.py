"""A linear layer whose weight stays packed: what generation with a quantized model runs."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels import backend
from grist_kernels.quantized import PackedWeight
from grist_kernels.quantized_linear import pytorch_fast, reference


def quantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., I) -> x @ weight.T + bias, (..., O) in x's type, summed in float32.

    weight: an Int8Weight, Int4Weight, Fp8Weight or Mxfp4Weight of (O, I), best contiguous, or every call copies it. bias
    (O,) in x's type. The weights are the numbers that `weight.dequantise` gives; on a GPU they are multiplied in x's type.

    On a CPU up to 64 rows multiply the weight as it is, in C (grist_kernels.native), 8 rows each time it is read. For more,
    some rows of the weight are dequantised at a time, in x's type: memory is saved, and time is lost to the weight unpacked.

    Differentiable in x and bias, not by the Triton kernel: a call that asks for gradients runs in plain PyTorch.

    Raises ValueError if shapes, types or devices do not fit.
    """
    _check(x, weight, bias)
    choice = backend.implementation("quantized_linear", x.device.type, _cannot(x, bias))
    if choice == "triton":
        return backend.triton_kernel("quantized_linear").quantized_linear(x, weight, bias)
    if choice == "pytorch":
        return pytorch_fast.quantized_linear(x, weight, bias)
    return reference.quantized_linear(x, weight, bias)


def _cannot(x: Tensor, bias: Tensor | None) -> str | None:
    """Why the Triton kernel cannot take a call, if so."""
    given = [x] if bias is None else [x, bias]
    limit = None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        limit = (
            "quantized_linear's Triton kernel has no gradients, and one was asked for: call it under torch.no_grad()"
        )
    return backend.cannot_take("quantized_linear", *given, limit=limit)


def _check(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    if not isinstance(weight, PackedWeight):
        raise ValueError(
            "quantized_linear: weight must be an Int8Weight, Int4Weight, Fp8Weight or Mxfp4Weight of grist_kernels.quantized, "
            f"but is {type(weight).__name__}: for an unpacked one there is torch.nn.functional.linear"
        )
    if len(weight.shape) != 2:
        raise ValueError(f"quantized_linear: weight must be (O, I), but is {tuple(weight.shape)}: index experts first")
    outputs, inputs = weight.shape
    if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] != inputs:
        raise ValueError(
            f"quantized_linear: x must be (..., {inputs}) and floating point to match the weight {tuple(weight.shape)}, but is "
            f"{tuple(x.shape)} {x.dtype}"
        )
    if bias is not None and (tuple(bias.shape) != (outputs,) or bias.dtype != x.dtype):
        raise ValueError(
            f"quantized_linear: bias must be ({outputs},) {x.dtype} to match the weight and x, but is {tuple(bias.shape)} "
            f"{bias.dtype}"
        )
    for name, part in weight.tensors.items():
        if part.device != x.device:
            raise ValueError(
                f"quantized_linear: weight.{name} is on {part.device}, but x is on {x.device}: move one of them"
            )
