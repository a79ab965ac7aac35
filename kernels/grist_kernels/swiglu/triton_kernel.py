"""SwiGLU in Triton: one pass forward, one pass backward, nothing kept but the input. F expert width.

A program takes a tile of rows and columns of the result. Interleaved columns are read as one contiguous stretch of gates
and ups and taken apart in registers: two loads with stride 2 would each fetch every sector.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (Device code is Python by its looks only: the compiler gives names, loops and calls other types than Python has.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grist_kernels import launch
from grist_kernels.budget import Budget
from grist_kernels.launch import Config, Target, cdiv
from grist_kernels.row_offsets import row_offsets
from grist_kernels.rows import as_rows
from grist_kernels.two_faces import differentiable, faces

SIZES = (32, 64, 128, 256, 512, 1024)  # columns of a tile


@triton.jit
def gate_and_up(gate, up, alpha, limit, HAS_ALPHA: tl.constexpr, HAS_LIMIT: tl.constexpr):
    """float32 gate and up -> (clamped gate, its sigmoid, clamped and shifted up). The output is their product."""
    if HAS_LIMIT:  # comparisons, not tl.minimum: a NaN must stay one
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if HAS_ALPHA:
        return gate, tl.sigmoid(alpha * gate), up + 1.0
    return gate, tl.sigmoid(gate), up


@triton.jit
def slopes(d_out, gate, up, alpha, limit, HAS_ALPHA: tl.constexpr, HAS_LIMIT: tl.constexpr):
    """Gradients of gate and up, float32: d_gate = d_out * up * s * (1 + a * gate * (1 - s)), with s = sigmoid(a * gate)."""
    clamped, sigmoid, shifted = gate_and_up(gate, up, alpha, limit, HAS_ALPHA, HAS_LIMIT)
    bend = clamped * (1.0 - sigmoid)
    if HAS_ALPHA:
        bend *= alpha
    d_gate = d_out * shifted * sigmoid * (1.0 + bend)
    d_up = d_out * clamped * sigmoid
    if HAS_LIMIT:  # on the limit itself the gradient passes, as torch.clamp's does
        d_gate = tl.where(gate > limit, 0.0, d_gate)
        d_up = tl.where((up > limit) | (up < -limit), 0.0, d_up)
    return d_gate, d_up


@triton.jit
def _load_pair(
    rows_ptr, first, row_mask, F: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Gates and ups (ROWS, BLOCK) float32 of the columns from `first` on."""
    if INTERLEAVED:
        columns = 2 * first + tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.load(rows_ptr + columns, mask=row_mask & (columns < 2 * F), other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
    else:
        columns = first + tl.arange(0, BLOCK)[None, :]
        mask = row_mask & (columns < F)
        gate = tl.load(rows_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(rows_ptr + F + columns, mask=mask, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _forward_kernel(
    x_ptr, out_ptr, n_rows, inner, x_outer, x_inner, alpha, limit, column_blocks,
    F: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows = program // column_blocks * ROWS + tl.arange(0, ROWS)
    first = program % column_blocks * BLOCK
    row_mask = (rows < n_rows)[:, None]
    x_rows = x_ptr + row_offsets(rows, inner, x_outer, x_inner)[:, None]
    gate, up = _load_pair(x_rows, first, row_mask, F, INTERLEAVED, ROWS, BLOCK)
    clamped, sigmoid, shifted = gate_and_up(gate, up, alpha, limit, HAS_ALPHA, HAS_LIMIT)
    columns = first + tl.arange(0, BLOCK)[None, :]
    out = (clamped * sigmoid * shifted).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * F + columns, out, mask=row_mask & (columns < F))


@triton.jit
def _backward_kernel(
    d_out_ptr, x_ptr, dx_ptr,
    n_rows, d_inner, d_outer_stride, d_inner_stride, inner, x_outer, x_inner, alpha, limit, column_blocks,
    F: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows = program // column_blocks * ROWS + tl.arange(0, ROWS)
    first = program % column_blocks * BLOCK
    row_mask = (rows < n_rows)[:, None]
    x_rows = x_ptr + row_offsets(rows, inner, x_outer, x_inner)[:, None]
    gate, up = _load_pair(x_rows, first, row_mask, F, INTERLEAVED, ROWS, BLOCK)
    columns = first + tl.arange(0, BLOCK)[None, :]
    mask = row_mask & (columns < F)
    d_rows = d_out_ptr + row_offsets(rows, d_inner, d_outer_stride, d_inner_stride)[:, None]
    d_out = tl.load(d_rows + columns, mask=mask, other=0.0).to(tl.float32)
    d_gate, d_up = slopes(d_out, gate, up, alpha, limit, HAS_ALPHA, HAS_LIMIT)
    dx_rows = dx_ptr + rows.to(tl.int64)[:, None] * (2 * F)
    if INTERLEAVED:
        both = tl.reshape(tl.join(d_gate, d_up), (ROWS, 2 * BLOCK)).to(dx_ptr.dtype.element_ty)
        wide = 2 * first + tl.arange(0, 2 * BLOCK)[None, :]
        tl.store(dx_rows + wide, both, mask=row_mask & (wide < 2 * F))
    else:
        tl.store(dx_rows + columns, d_gate.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_rows + F + columns, d_up.to(dx_ptr.dtype.element_ty), mask=mask)


def tile_columns(F: int) -> int:
    """The widest tile that masks off less than 7 % of its lanes, else the one that masks off fewest."""
    padded = {block: cdiv(F, block) * block for block in SIZES}
    good = [block for block in SIZES if padded[block] <= 1.07 * F]
    return max(good) if good else min(SIZES, key=lambda block: padded[block])


def tile_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    """2,048 results a program of 128 threads: a thread has four loads of 16 bytes in flight (bfloat16)."""
    return {"ROWS": 2048 // size, "num_warps": 128 // target.lanes}


def tile_candidates(target: Target, dtype: torch.dtype, size: int) -> list[Config]:
    """For the tuner: 4 to 32 results a thread."""
    return [
        {"ROWS": results * threads // size, "num_warps": threads // target.lanes}
        for threads in (64, 128, 256)
        for results in (4, 8, 16, 32)
        if results * threads >= size
    ]


FORMULAS = {"forward": tile_formula, "backward": tile_formula}
CANDIDATES = {"forward": tile_candidates, "backward": tile_candidates}
BUDGETS = {"forward": Budget(registers=64), "backward": Budget(registers=152)}


def _shape(kernel: str, like: Tensor, F: int, n_rows: int) -> tuple[int, int, Config]:
    """(grid, column blocks, constants) of a launch."""
    block = tile_columns(F)
    config = launch.config("swiglu", kernel, launch.target(like.device), like.dtype, block, tile_formula)
    column_blocks = cdiv(F, block)
    return cdiv(n_rows, config["ROWS"]) * column_blocks, column_blocks, {"BLOCK": block, **config}


def _options(alpha: float | None, limit: float | None) -> tuple[float, float, Config]:
    """The numbers as the kernels take them, and which of them are given."""
    given = {"HAS_ALPHA": alpha is not None, "HAS_LIMIT": limit is not None}
    return 1.0 if alpha is None else float(alpha), 0.0 if limit is None else float(limit), given


def _forward(gate_up: Tensor, alpha: float | None, limit: float | None, interleaved: bool) -> Tensor:
    F = gate_up.shape[-1] // 2
    inner, (x,) = as_rows(gate_up)
    n_rows = gate_up.shape[:-1].numel()
    out = torch.empty((*gate_up.shape[:-1], F), dtype=gate_up.dtype, device=gate_up.device)
    grid, column_blocks, config = _shape("forward", gate_up, F, n_rows)
    alpha, limit, given = _options(alpha, limit)
    launch.run(
        _forward_kernel, (grid,), gate_up.device, x.tensor, out, n_rows, inner, x.outer_stride, x.inner_stride,
        alpha, limit, column_blocks, F=F, INTERLEAVED=interleaved, **given, **config,
    )  # fmt: skip
    return out


def _backward(d_out: Tensor, gate_up: Tensor, alpha: float | None, limit: float | None, interleaved: bool) -> Tensor:
    F = gate_up.shape[-1] // 2
    inner, (x,) = as_rows(gate_up)
    d_inner, (d,) = as_rows(d_out)
    n_rows = gate_up.shape[:-1].numel()
    dx = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    grid, column_blocks, config = _shape("backward", gate_up, F, n_rows)
    alpha, limit, given = _options(alpha, limit)
    launch.run(
        _backward_kernel, (grid,), gate_up.device, d.tensor, x.tensor, dx, n_rows, d_inner, d.outer_stride, d.inner_stride,
        inner, x.outer_stride, x.inner_stride, alpha, limit, column_blocks, F=F, INTERLEAVED=interleaved, **given, **config,
    )  # fmt: skip
    return dx


_FORWARD = faces(
    "swiglu(Tensor gate_up, float? alpha, float? limit, bool interleaved) -> Tensor",
    _forward,
    lambda gate_up, alpha, limit, interleaved: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)
_BACKWARD = faces(
    "swiglu_backward(Tensor d_out, Tensor gate_up, float? alpha, float? limit, bool interleaved) -> Tensor",
    _backward,
    lambda d_out, gate_up, alpha, limit, interleaved: gate_up.new_empty(gate_up.shape),
)


def _save(ctx, inputs, output) -> None:
    gate_up, *ctx.options = inputs
    ctx.save_for_backward(gate_up)


def _gradients(ctx, run, d_out):
    if d_out is None:
        return None, None, None, None
    (gate_up,) = ctx.saved_tensors
    return run(d_out, gate_up, *ctx.options), None, None, None


_activated = differentiable(_FORWARD, _BACKWARD, _save, _gradients)


def swiglu(gate_up: Tensor, *, alpha: float | None, limit: float | None, interleaved: bool) -> Tensor:
    """As grist_kernels.swiglu."""
    return _activated(gate_up, alpha, limit, interleaved)
