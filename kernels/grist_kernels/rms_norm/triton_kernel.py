"""RMSNorm in Triton: one pass forward, one pass and a small sum backward. R rows, D model width.

A row is held in registers as a few chunks of BLOCK columns, so that D = 2880 takes 3 * 1024 lanes and not 4096. Narrow rows
go several to a program. The backward gives each program a contiguous range of rows: it keeps the weight and its share of
dweight in registers, and writes that share once, as one float32 row. No atomics: the same bits every time.
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
from grist_kernels.column_sums import sum_rows
from grist_kernels.launch import Config, Target, cdiv
from grist_kernels.row_offsets import row_offsets
from grist_kernels.rows import as_rows
from grist_kernels.two_faces import differentiable, faces

SIZES = (64, 256, 1024, 2048, 3072, 4096, 5120, 8192, 16384)


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr,
    n_rows, inner, x_outer, x_inner, residual_outer, residual_inner, eps, offset,
    D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = (rows < n_rows)[:, None]
    x_rows = x_ptr + row_offsets(rows, inner, x_outer, x_inner)[:, None]
    residual_rows = residual_ptr + row_offsets(rows, inner, residual_outer, residual_inner)[:, None]
    out_rows = row_offsets(rows, 1, D, 0)[:, None]
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    chunks = ()
    weights = ()
    for start in tl.static_range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        mask = row_mask & (columns < D)
        h = tl.load(x_rows + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            h += tl.load(residual_rows + columns, mask=mask, other=0.0).to(tl.float32)
            tl.store(sum_ptr + out_rows + columns, h.to(sum_ptr.dtype.element_ty), mask=mask)
        squares += h * h
        chunks = chunks + (h,)
        # Loaded before the sum, whose barrier no load crosses.
        weights = weights + (tl.load(weight_ptr + columns, mask=columns < D, other=0.0),)
    rstd = tl.rsqrt(tl.sum(squares, 1) / D + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    for i in tl.static_range(0, len(chunks)):
        columns = i * BLOCK + tl.arange(0, BLOCK)[None, :]
        y = chunks[i] * rstd[:, None] * (weights[i].to(tl.float32) + offset)
        tl.store(y_ptr + out_rows + columns, y.to(y_ptr.dtype.element_ty), mask=row_mask & (columns < D))


@triton.jit
def _backward_kernel(
    dy_ptr, dsum_ptr, h_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr,
    n_rows, rows_per_program, inner, dy_outer, dy_inner, dsum_outer, dsum_inner, h_outer, h_inner, offset,
    D: tl.constexpr, HAS_DSUM: tl.constexpr, WITH_DWEIGHT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    dweights = ()
    for _ in tl.static_range(0, D, BLOCK):
        dweights = dweights + (tl.zeros((ROWS, BLOCK), tl.float32),)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        row_mask = (rows < last)[:, None]
        dy_rows = dy_ptr + row_offsets(rows, inner, dy_outer, dy_inner)[:, None]
        dsum_rows = dsum_ptr + row_offsets(rows, inner, dsum_outer, dsum_inner)[:, None]
        h_rows = h_ptr + row_offsets(rows, inner, h_outer, h_inner)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < last, other=0.0)[:, None]
        products = tl.zeros((ROWS, BLOCK), tl.float32)
        slopes = ()
        normed = ()
        passed = ()
        sums = ()
        for start in tl.static_range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)[None, :]
            mask = row_mask & (columns < D)
            dy = tl.load(dy_rows + columns, mask=mask, other=0.0).to(tl.float32)
            xhat = tl.load(h_rows + columns, mask=mask, other=0.0).to(tl.float32) * rstd
            weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32) + offset
            if HAS_DSUM and EARLY:  # before the sum over the row, whose barrier no load crosses
                passed = passed + (tl.load(dsum_rows + columns, mask=mask, other=0.0),)
            products += dy * weight * xhat
            slopes = slopes + (dy * weight,)
            normed = normed + (xhat,)
            sums = sums + (dweights[start // BLOCK] + dy * xhat,)
        dweights = sums
        mean = (tl.sum(products, 1) / D)[:, None]
        dx_rows = dx_ptr + row_offsets(rows, 1, D, 0)[:, None]
        for start in tl.static_range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)[None, :]
            mask = row_mask & (columns < D)
            dx = (slopes[start // BLOCK] - normed[start // BLOCK] * mean) * rstd
            if HAS_DSUM:
                if EARLY:
                    dsum = passed[start // BLOCK]
                else:
                    dsum = tl.load(dsum_rows + columns, mask=mask, other=0.0)
                dx += dsum.to(tl.float32)
            tl.store(dx_rows + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if WITH_DWEIGHT:
        for start in tl.static_range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            target = partial_ptr + program.to(tl.int64) * D + columns
            tl.store(target, tl.sum(dweights[start // BLOCK], 0), mask=columns < D)


def size_bucket(D: int) -> int:
    """The launch table's size for a width D."""
    return next(size for size in SIZES if size >= D)


def forward_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    """Eight elements of a chunk a thread: one vector of 16 bytes in bfloat16, two in float32."""
    threads = 128 if size <= 5120 else 256 if size <= 8192 else 512
    rows, block = (2048 // size, size) if size <= 1024 else (1, 8 * threads)
    return {"ROWS": rows, "BLOCK": block, "num_warps": threads // target.lanes}


def backward_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    """Vectors as in the forward, more threads to hold dweight, and PROGRAMS a multiprocessor, so that rows of about 64 KiB are
    in flight on each. EARLY asks for dsum with the rest of the row, which the widest rows have no registers for."""
    threads = 128 if size <= 3072 else 256 if size <= 5120 else 512 if size <= 8192 else 1024
    vectors = 16 // dtype.itemsize if threads == 1024 else 8  # 64 registers a thread are too few for two of float32
    rows, block = (2048 // size, size) if size <= 1024 else (1, vectors * threads)
    in_flight = rows * size * dtype.itemsize * 2
    programs = min(8, max(1, 65536 // in_flight))
    return {
        "ROWS": rows,
        "BLOCK": block,
        "EARLY": int(size <= 8192),
        "PROGRAMS": programs,
        "num_warps": threads // target.lanes,
    }


def forward_candidates(target: Target, dtype: torch.dtype, size: int) -> list[Config]:
    """For the tuner: more and fewer threads, rows and chunks."""
    found: list[Config] = []
    for threads in (64, 128, 256, 512, 1024):
        warps = threads // target.lanes
        if size <= 1024:
            found += [{"ROWS": rows, "BLOCK": size, "num_warps": warps} for rows in (1, 2, 4, 8, 16, 32)]
        else:
            found += [{"ROWS": 1, "BLOCK": vectors * threads, "num_warps": warps} for vectors in (4, 8, 16)]
    elements = [config["ROWS"] * max(size, config["BLOCK"]) for config in found]
    return [
        config
        for config, count in zip(found, elements, strict=True)
        if 4 <= count // (config["num_warps"] * target.lanes) <= 64
    ]


def backward_candidates(target: Target, dtype: torch.dtype, size: int) -> list[Config]:
    """For the tuner: the forward's shapes, dsum early or late, and one to eight programs a multiprocessor."""
    return [
        {**config, "EARLY": early, "PROGRAMS": programs}
        for config in forward_candidates(target, dtype, size)
        if config["ROWS"] * max(size, config["BLOCK"]) // (config["num_warps"] * target.lanes) <= 32
        for early in (0, 1)
        for programs in (1, 2, 4, 8)
    ]


FORMULAS = {"forward": forward_formula, "backward": backward_formula}
CANDIDATES = {"forward": forward_candidates, "backward": backward_candidates}
BUDGETS = {
    "forward": Budget(registers=104),
    # 1,024 threads, which rows of 16,384 need, have 64 registers each; float32 is short of a few.
    "backward": Budget(registers=160, float32_spilled_bytes=32),
    "reduce": Budget(registers=64),
}


def _launch_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> list[Tensor]:
    """[y, rstd], or [y, x + residual, rstd]; rstd is (rows,) float32."""
    D, device = x.shape[-1], x.device
    given = (x,) if residual is None else (x, residual)
    inner, rows = as_rows(*given)
    n_rows = x.numel() // D
    y, *total = (torch.empty(x.shape, dtype=x.dtype, device=device) for _ in given)
    rstd = torch.empty(n_rows, dtype=torch.float32, device=device)
    config = launch.config("rms_norm", "forward", launch.target(device), x.dtype, size_bucket(D), forward_formula)
    launch.run(
        _forward_kernel, (cdiv(n_rows, config["ROWS"]),), device,
        rows[0].tensor, rows[-1].tensor, weight.contiguous(), y, total[0] if total else y, rstd,
        n_rows, inner, *rows[0][1:], *rows[-1][1:], eps, offset,
        D=D, HAS_RESIDUAL=residual is not None, **config,
    )  # fmt: skip
    return [y, *total, rstd]


def _launch_backward(
    dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, offset: float, with_dweight: bool
) -> list[Tensor]:
    """[dx, dweight]; dweight is empty unless it is wanted."""
    D, device = h.shape[-1], h.device
    inner, rows = as_rows(dy, h) if dsum is None else as_rows(dy, h, dsum)
    n_rows = h.numel() // D
    target = launch.target(device)
    config = dict(launch.config("rms_norm", "backward", target, h.dtype, size_bucket(D), backward_formula))
    steps = cdiv(n_rows, config["ROWS"])
    per_program = cdiv(steps, max(1, min(steps, config.pop("PROGRAMS") * target.processors)))
    programs = cdiv(steps, max(1, per_program))
    dx = torch.empty(h.shape, dtype=h.dtype, device=device)
    partial = torch.empty((programs if with_dweight else 0, D), dtype=torch.float32, device=device)
    launch.run(
        _backward_kernel, (programs,), device,
        rows[0].tensor, rows[-1].tensor, rows[1].tensor, weight.contiguous(), rstd, dx, partial,
        n_rows, per_program * config["ROWS"], inner, *rows[0][1:], *rows[-1][1:], *rows[1][1:], offset,
        D=D, HAS_DSUM=dsum is not None, WITH_DWEIGHT=with_dweight, **config,
    )  # fmt: skip
    return [dx, sum_rows(partial, weight.dtype) if with_dweight else weight.new_empty(0)]


def _normalize(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, rstd = _launch_forward(x, None, weight, eps, offset)
    return y, rstd


def _add_and_normalize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, rstd = _launch_forward(x, residual, weight, eps, offset)
    return y, total, rstd


def _slopes(
    dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, offset: float, with_dweight: bool
) -> tuple[Tensor, Tensor]:
    dx, dweight = _launch_backward(dy, dsum, h, weight, rstd, offset, with_dweight)
    return dx, dweight


def _empty_rows(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_NORMALIZE = faces(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
    _normalize,
    lambda x, weight, eps, offset: (_like(x), _empty_rows(x)),
)
_ADD_AND_NORMALIZE = faces(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
    _add_and_normalize,
    lambda x, residual, weight, eps, offset: (_like(x), _like(x), _empty_rows(x)),
)
_SLOPES = faces(
    "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor h, Tensor weight, Tensor rstd, float offset, bool with_dweight)"
    " -> (Tensor, Tensor)",
    _slopes,
    lambda dy, dsum, h, weight, rstd, offset, with_dweight: (
        _like(h),
        weight.new_empty(weight.shape[0] if with_dweight else 0),
    ),
)


def _save(ctx, inputs, output) -> None:
    x, weight, _, ctx.offset = inputs
    ctx.save_for_backward(x, weight, output[-1])


def _gradients(ctx, run, dy, *_):
    x, weight, rstd = ctx.saved_tensors
    if dy is None:
        return None, None, None, None
    dx, dweight = run(dy, None, x, weight, rstd, ctx.offset, ctx.needs_input_grad[1])
    return dx, dweight if ctx.needs_input_grad[1] else None, None, None


def _save_sum(ctx, inputs, output) -> None:
    _, _, weight, _, ctx.offset = inputs
    ctx.save_for_backward(output[1], weight, output[2])


def _gradients_sum(ctx, run, dy, dsum, *_):
    h, weight, rstd = ctx.saved_tensors
    if dy is None:
        return dsum, dsum, None, None, None
    dx, dweight = run(dy, dsum, h, weight, rstd, ctx.offset, ctx.needs_input_grad[2])
    return dx, dx, dweight if ctx.needs_input_grad[2] else None, None, None


_normalized = differentiable(_NORMALIZE, _SLOPES, _save, _gradients)
_added_and_normalized = differentiable(_ADD_AND_NORMALIZE, _SLOPES, _save_sum, _gradients_sum)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, *, offset: float
) -> Tensor | tuple[Tensor, Tensor]:
    """As grist_kernels.rms_norm."""
    if residual is None:
        return _normalized(x, weight, eps, float(offset))[0]
    return _added_and_normalized(x, residual, weight, eps, float(offset))[:2]
