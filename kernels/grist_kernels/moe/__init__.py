"""The experts of a mixture-of-experts layer, after the router has chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels import backend
from grist_kernels.moe import pytorch_fast, reference
from grist_kernels.swiglu import check_options


def moe(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    """out[t] = sum over a of expert_weights[t, a] * expert(expert_ids[t, a])(x[t]): x (T, D) -> (T, D) in x's type.

    expert(e)(x) = swiglu(x @ w_gate_up[e] + b_gate_up[e]) @ w_down[e] + b_down[e], with alpha, limit and interleaved as in
    `swiglu`. expert_ids (T, A) integers in [0, E); expert_weights (T, A), any floating type; w_gate_up (E, D, 2F),
    w_down (E, F, D), b_gate_up (E, 2F), b_down (E, D), all of x's type.

    Differentiable in x, expert_weights, the weights and the biases. An expert without tokens gets gradients of exactly zero.

    Raises ValueError if shapes, types or options do not fit, and, where that can be seen without waiting for a device, if an
    expert id is out of range.
    """
    _check(x, expert_ids, expert_weights, w_gate_up, w_down, b_gate_up, b_down)
    check_options("moe", alpha, limit)
    options = {"alpha": alpha, "limit": limit, "interleaved": interleaved}
    choice = backend.implementation("moe", x.device.type, backend.cannot_take("moe", x, expert_weights))
    if choice == "triton":
        return backend.triton_kernel("moe").moe(
            x, expert_ids, expert_weights, w_gate_up, w_down, b_gate_up, b_down, **options
        )
    if choice == "pytorch":
        return pytorch_fast.moe(x, expert_ids, expert_weights, w_gate_up, w_down, b_gate_up, b_down, **options)
    return reference.moe(x, expert_ids, expert_weights, w_gate_up, w_down, b_gate_up, b_down, **options)


def _check(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
) -> None:
    if w_gate_up.dim() != 3 or w_gate_up.shape[2] % 2:
        raise ValueError(f"moe: w_gate_up must be (E, D, 2F), but is {tuple(w_gate_up.shape)}")
    E, D, F = w_gate_up.shape[0], w_gate_up.shape[1], w_gate_up.shape[2] // 2
    if x.dim() != 2 or x.shape[1] != D:
        raise ValueError(
            f"moe: x must be (T, {D}) to match w_gate_up {tuple(w_gate_up.shape)}, but is {tuple(x.shape)}"
        )
    if w_down.shape != (E, F, D):
        raise ValueError(f"moe: w_down must be (E, F, D) = {(E, F, D)}, but is {tuple(w_down.shape)}")
    check_routing("moe", x.shape[0], expert_ids, expert_weights)
    check_biases("moe", x.dtype, b_gate_up=(b_gate_up, (E, 2 * F)), b_down=(b_down, (E, D)))
    if not x.is_floating_point() or not (x.dtype == w_gate_up.dtype == w_down.dtype):
        raise ValueError(
            "moe: x, w_gate_up and w_down must have one floating type, "
            f"but are {x.dtype}, {w_gate_up.dtype} and {w_down.dtype}"
        )


def check_routing(op: str, tokens: int, expert_ids: Tensor, expert_weights: Tensor) -> None:
    """Raise ValueError unless expert_ids and expert_weights are (tokens, A), integers and floating point."""
    if expert_ids.dim() != 2 or expert_ids.shape[0] != tokens or expert_ids.shape != expert_weights.shape:
        raise ValueError(
            f"{op}: expert_ids and expert_weights must both be ({tokens}, A), "
            f"but are {tuple(expert_ids.shape)} and {tuple(expert_weights.shape)}"
        )
    if expert_ids.dtype not in (torch.int64, torch.int32) or not expert_weights.is_floating_point():
        raise ValueError(
            f"{op}: expert_ids must be int32 or int64 and expert_weights floating point, "
            f"but are {expert_ids.dtype} and {expert_weights.dtype}"
        )


def check_biases(op: str, dtype: torch.dtype, **biases: tuple[Tensor | None, tuple[int, int]]) -> None:
    """Raise ValueError unless each bias that is there has its shape, and the type of x."""
    for name, (bias, shape) in biases.items():
        if bias is not None and (bias.shape != shape or bias.dtype != dtype):
            raise ValueError(f"{op}: {name} must be {shape} {dtype}, but is {tuple(bias.shape)} {bias.dtype}")
