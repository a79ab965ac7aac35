"""Grouped products on a GPU: launches and gradients of the device code in kernels.py. R rows sorted by expert, E experts.

Nothing waits for the device: how many programs there are is decided by shapes alone (grist_kernels.expert_rows).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels import launch
from grist_kernels.expert_rows import Schedule, schedule
from grist_kernels.grouped_matmul.kernels import _forward_kernel, _outer_kernel, _segment_sum_kernel
from grist_kernels.grouped_matmul.launches import BUDGETS, CANDIDATES, FORMULAS, SIZES, tile_rows
from grist_kernels.launch import cdiv
from grist_kernels.two_faces import differentiable, faces

__all__ = [
    "BUDGETS", "CANDIDATES", "FORMULAS", "SIZES", "grouped_matmul", "matrices_of", "multiply", "outer", "rows_of",
    "segment_sum",
]  # fmt: skip


def rows_of(x: Tensor) -> Tensor:
    """x (rows, columns) with columns side by side: a copy only if they are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def matrices_of(w: Tensor) -> Tensor:
    """w (E, in, out) with any strides, as long as offsets inside one expert's matrix fit into 32 bits: else a copy."""
    _, width_in, width_out = w.shape
    return w if (width_in - 1) * w.stride(1) + (width_out - 1) * w.stride(2) < 2**31 else w.contiguous()


def multiply(x: Tensor, w: Tensor, bias: Tensor | None, tiles: Schedule, block: int) -> Tensor:
    """x (R, in), w (E, in, out) with any strides, bias (E, out) -> (R, out) in x's type. tiles: of `block` rows each."""
    x, w, bias = rows_of(x), matrices_of(w), None if bias is None else rows_of(bias)
    n_experts, width_in, width_out = w.shape
    out = torch.empty((x.shape[0], width_out), dtype=x.dtype, device=x.device)
    config = launch.config("grouped_matmul", "forward", launch.target(x.device), x.dtype, block, FORMULAS["forward"])
    launch.run(
        _forward_kernel, (tiles.tiles * cdiv(width_out, config["BLOCK_N"]),), x.device,
        x, w, w if bias is None else bias, out, *tiles, tiles.tiles, n_experts, x.stride(0), *w.stride(),
        0 if bias is None else bias.stride(0),
        IN=width_in, OUT=width_out, HAS_BIAS=bias is not None, BLOCK_M=block, **config,
    )  # fmt: skip
    return out


def outer(
    x: Tensor, dy: Tensor, starts: Tensor, n_experts: int, size: int, pair: Tensor | None = None, x_active: int = 0,
    dy_active: int = 0,
) -> Tensor:  # fmt: skip
    """x (R, in), dy (R, out) -> (E, in, out) in x's type: x[rows of e]^T dy[rows of e]. size: a bucket of SIZES.

    x_active (dy_active) is A where that operand is stored by token, (T, ...): row r is then that of token pair[r] // A.
    """
    x, dy = rows_of(x), rows_of(dy)
    width_in, width_out = x.shape[1], dy.shape[1]
    dw = torch.empty((n_experts, width_in, width_out), dtype=x.dtype, device=x.device)
    config = launch.config("grouped_matmul", "outer", launch.target(x.device), x.dtype, size, FORMULAS["outer"])
    blocks = cdiv(width_in, config["BLOCK_M"]) * cdiv(width_out, config["BLOCK_N"])
    launch.run(
        _outer_kernel, (n_experts * blocks,), x.device,
        x, dy, dw, starts if pair is None else pair, starts, x.stride(0), dy.stride(0),
        IN=width_in, OUT=width_out, X_ACTIVE=x_active, DY_ACTIVE=dy_active, **config,
    )  # fmt: skip
    return dw


def segment_sum(
    dy: Tensor, starts: Tensor, n_experts: int, pair: Tensor | None = None, active: int = 0,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dy (R, out) -> (E, out) in its type: the sum of each expert's rows, times weights[pair[r]] if there are weights.

    active: as outer's dy_active.
    """
    dy = rows_of(dy)
    total = torch.empty((n_experts, dy.shape[1]), dtype=dy.dtype, device=dy.device)
    launch.run(
        _segment_sum_kernel, (n_experts * cdiv(dy.shape[1], 64),), dy.device,
        dy, starts if weights is None else weights, total, starts if pair is None else pair, starts, dy.stride(0),
        OUT=dy.shape[1], ACTIVE=active, HAS_WEIGHTS=weights is not None, ROWS=32, BLOCK=64, num_warps=4,
    )  # fmt: skip
    return total


def _forward(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    block = tile_rows(x.shape[0], w.shape[0])
    return multiply(x, w, bias, schedule(offsets.contiguous(), x.shape[0], block, spare=True), block)


def _backward(
    dy: Tensor, x: Tensor, w: Tensor, offsets: Tensor, has_bias: bool, need_x: bool, need_w: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w and bias; an empty tensor stands for one that nobody asked for."""
    n_experts, block = w.shape[0], tile_rows(x.shape[0], w.shape[0])
    tiles = schedule(offsets.contiguous(), x.shape[0], block, spare=True)
    dx = multiply(dy, w.transpose(1, 2), None, tiles, block) if need_x else dy.new_empty(0)
    dw = outer(x, dy, tiles.starts, n_experts, block) if need_w else dy.new_empty(0)
    dbias = segment_sum(dy, tiles.starts, n_experts) if has_bias else dy.new_empty(0)
    return dx, dw, dbias


def _fake_backward(dy, x, w, offsets, has_bias, need_x, need_w):
    return (
        dy.new_empty(x.shape) if need_x else dy.new_empty(0),
        dy.new_empty(w.shape) if need_w else dy.new_empty(0),
        dy.new_empty(w.shape[0], w.shape[2]) if has_bias else dy.new_empty(0),
    )


_FORWARD = faces(
    "grouped_matmul(Tensor x, Tensor w, Tensor offsets, Tensor? bias) -> Tensor",
    _forward,
    lambda x, w, offsets, bias: x.new_empty(x.shape[0], w.shape[2]),
)
_BACKWARD = faces(
    "grouped_matmul_backward(Tensor dy, Tensor x, Tensor w, Tensor offsets, bool has_bias, bool need_x, bool need_w)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _save(ctx, inputs, output) -> None:
    x, w, offsets, bias = inputs
    ctx.save_for_backward(x, w, offsets)
    ctx.has_bias = bias is not None


def _gradients(ctx, run, dy):
    if dy is None:
        return None, None, None, None
    x, w, offsets = ctx.saved_tensors
    need_x, need_w, _, need_bias = ctx.needs_input_grad
    need_bias = need_bias and ctx.has_bias
    dx, dw, dbias = run(dy, x, w, offsets, need_bias, need_x, need_w)
    return dx if need_x else None, dw if need_w else None, None, dbias if need_bias else None


_multiplied = differentiable(_FORWARD, _BACKWARD, _save, _gradients)


def grouped_matmul(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """As grist_kernels.grouped_matmul."""
    return _multiplied(x, w, offsets, bias)
