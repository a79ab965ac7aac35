"""The gated activation of the feed-forward layers."""

from __future__ import annotations

from torch import Tensor

from grist_kernels import backend
from grist_kernels.swiglu import pytorch_fast, reference


def swiglu(
    gate_up: Tensor, *, alpha: float | None = None, limit: float | None = None, interleaved: bool = False
) -> Tensor:
    """gate_up (..., 2F) -> (..., F) in the same type; computed in float32. Differentiable in gate_up.

    Where gate and up stand: the halves [gate | up], or, interleaved, gate in the even and up in the odd columns (GPT-OSS).
    alpha=None is the plain form  gate * sigmoid(gate) * up  (Shazeer, "GLU Variants Improve Transformer", 2020).
    alpha=a is the GPT-OSS form   gate * sigmoid(a * gate) * (up + 1).
    limit=c clamps first, in either form: gate to at most c, up to [-c, c]; a clamped element gets gradient zero. GPT-OSS uses
    alpha=1.702 and limit=7 together; alpha without a limit is its form without the clamps.

    Raises ValueError if the last axis is odd, or limit or alpha is not positive.
    """
    check(gate_up, alpha, limit)
    choice = backend.implementation("swiglu", gate_up.device.type, backend.cannot_take("swiglu", gate_up))
    if choice == "triton":
        return backend.triton_kernel("swiglu").swiglu(gate_up, alpha=alpha, limit=limit, interleaved=interleaved)
    if choice == "pytorch" and pytorch_fast.fits(gate_up):
        return pytorch_fast.swiglu(gate_up, alpha=alpha, limit=limit, interleaved=interleaved)
    return reference.swiglu(gate_up, alpha=alpha, limit=limit, interleaved=interleaved)


def check(gate_up: Tensor, alpha: float | None, limit: float | None) -> None:
    """Raise ValueError unless the arguments fit; also moe's check of the same arguments."""
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2 or not gate_up.is_floating_point():
        raise ValueError(
            "swiglu: gate_up must be floating point with an even last axis 2F, "
            f"but is {tuple(gate_up.shape)} {gate_up.dtype}"
        )
    check_options("swiglu", alpha, limit)


def check_options(op: str, alpha: float | None, limit: float | None) -> None:
    if alpha is not None and not alpha > 0:
        raise ValueError(
            f"{op}: alpha must be positive (GPT-OSS: 1.702) or None for the plain SiLU gate, but is {alpha}"
        )
    if limit is not None and not limit > 0:
        raise ValueError(f"{op}: limit must be positive (GPT-OSS: 7.0) or None for no clamp, but is {limit}")
