"""Grouped matrix products in plain PyTorch. R rows sorted by expert, E experts.

`F.grouped_mm` where it is made for it (bfloat16 on CUDA, 16-byte strides; one launch, no synchronisation), a loop over
the experts' segments of rows elsewhere (on a CPU as fast, and without its limits on strides: kernels/README.md). The loop
must know the row ends on the host. To torch.compile both are one opaque operator, so there is no graph break.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def grouped_matmul(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """As grist_kernels.grouped_matmul."""
    if torch.compiler.is_compiling():
        return torch.ops.grist.grouped_matmul(x, w, offsets, bias)
    return _GroupedMatmul.apply(x, w, offsets, bias)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w, offsets)
        ctx.has_bias = bias is not None
        return multiply(x, w, offsets, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, w, offsets = ctx.saved_tensors
        dx = multiply(dy, w.transpose(1, 2), offsets, None) if ctx.needs_input_grad[0] else None
        dw = outer(x, dy, offsets) if ctx.needs_input_grad[1] else None
        dbias = segment_sum(dy, offsets) if ctx.has_bias and ctx.needs_input_grad[3] else None
        return dx, dw, None, dbias


def multiply(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """x (R, in), w (E, in, out) -> (R, out), rows past the last offset zero."""
    if _grouped_mm_fits(x, w):
        return _multiply_grouped_mm(x, w, offsets, bias)
    out = x.new_zeros(x.shape[0], w.shape[2])
    for e, rows in _segments(offsets, x.shape[0]):
        if bias is None:
            torch.mm(x[rows], w[e], out=out[rows])
        else:
            torch.addmm(bias[e], x[rows], w[e], out=out[rows])
    return out


def outer(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    """x (R, in), dy (R, out) -> (E, in, out): each expert's x^T dy; zero for an empty expert."""
    if _grouped_mm_fits(x.T, dy):
        return torch.nn.functional.grouped_mm(x.T, dy.contiguous(), offs=offsets.int())
    out = x.new_zeros(offsets.shape[0], x.shape[1], dy.shape[1])
    for e, rows in _segments(offsets, x.shape[0]):
        torch.mm(x[rows].T, dy[rows], out=out[e])
    return out


def segment_sum(dy: Tensor, offsets: Tensor) -> Tensor:
    """dy (R, out) -> (E, out): the sum of each expert's rows; zero for an empty expert. No atomics on any device."""
    ones = dy.new_ones(dy.shape[0], 8)  # eight columns make 16 bytes of bfloat16
    if _grouped_mm_fits(ones.T, dy):
        return outer(ones, dy, offsets)[:, 0]
    out = dy.new_zeros(offsets.shape[0], dy.shape[1])
    for e, rows in _segments(offsets, dy.shape[0]):
        torch.sum(dy[rows], 0, out=out[e])
    return out


def _segments(offsets: Tensor, rows: int) -> list[tuple[int, slice]]:
    ends = [0, *offsets.tolist()]
    if any(a > b for a, b in itertools.pairwise(ends)) or ends[-1] > rows:
        raise ValueError(
            f"grouped_matmul: offsets must rise from 0 to at most {rows}, the number of rows, but are {ends[1:]}"
        )
    return [(e, slice(ends[e], ends[e + 1])) for e in range(len(ends) - 1) if ends[e] < ends[e + 1]]


def _expert_of_row(offsets: Tensor, rows: int) -> Tensor:
    return torch.searchsorted(offsets, torch.arange(rows, device=offsets.device, dtype=offsets.dtype), right=True)


def _grouped_mm_fits(a: Tensor, b: Tensor) -> bool:
    """F.grouped_mm wants every stride but the unit one to be a multiple of 16 bytes."""
    return a.device.type == "cuda" and a.dtype == torch.bfloat16 and _aligned(a) and _aligned(b)


def _aligned(x: Tensor) -> bool:
    strides = x.stride()[-2:]
    return 1 in strides and all(s == 1 or s * x.element_size() % 16 == 0 for s in strides) and x.data_ptr() % 16 == 0


def _multiply_grouped_mm(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.nn.functional.grouped_mm(x, w, offs=offsets.int())
    expert_R = _expert_of_row(offsets, x.shape[0])
    if bias is not None:
        out = out + torch.cat((bias, bias.new_zeros(1, bias.shape[1])))[expert_R]
    # F.grouped_mm leaves the rows past the last offset uninitialised (seen: 3e38), and NaN times zero is NaN.
    return out.masked_fill((expert_R == w.shape[0])[:, None], 0.0)


@torch.library.custom_op("grist::grouped_matmul", mutates_args=())
def _grouped_matmul_op(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return multiply(x, w, offsets, bias)


@_grouped_matmul_op.register_fake
def _(x, w, offsets, bias):
    return x.new_empty(x.shape[0], w.shape[2])


@torch.library.custom_op("grist::grouped_outer", mutates_args=())
def _grouped_outer_op(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    return outer(x, dy, offsets)


@_grouped_outer_op.register_fake
def _(x, dy, offsets):
    return x.new_empty(offsets.shape[0], x.shape[1], dy.shape[1])


@torch.library.custom_op("grist::segment_sum", mutates_args=())
def _segment_sum_op(dy: Tensor, offsets: Tensor) -> Tensor:
    return segment_sum(dy, offsets)


@_segment_sum_op.register_fake
def _(dy, offsets):
    return dy.new_empty(offsets.shape[0], dy.shape[1])


def _save(ctx, inputs, output) -> None:
    x, w, offsets, bias = inputs
    ctx.save_for_backward(x, w, offsets)
    ctx.has_bias = bias is not None


def _backward(ctx, dy: Tensor):
    x, w, offsets = ctx.saved_tensors
    dx = torch.ops.grist.grouped_matmul(dy, w.transpose(1, 2), offsets, None)
    dw = torch.ops.grist.grouped_outer(x, dy, offsets)
    return dx, dw, None, torch.ops.grist.segment_sum(dy, offsets) if ctx.has_bias else None


_grouped_matmul_op.register_autograd(_backward, setup_context=_save)
