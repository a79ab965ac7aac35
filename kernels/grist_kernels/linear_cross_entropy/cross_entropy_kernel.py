"""Softmax, cross entropy and their gradient in Triton, in place over a chunk of logits. C rows of a chunk, V vocabulary.

A program takes one row. Its statistics run online: every lane keeps its own maximum and sum, over tiles of STEPS vectors a
lane, so that lanes meet only at the end of the row. The gradient is a second walk over the row, which overwrites the
logits. Either walk can be left out: evaluation needs no gradient, and the backward of reduction="none" knows the
statistics already. Statistics are an output of their own: shards of a vocabulary could be merged between the walks.
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
from grist_kernels.launch import Config, Target

SIZES = (2048, 16384, 262144)  # vocabularies up to this size; the last one also stands for all beyond

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-1e30)  # below any logit, and finite: -inf - -inf is NaN


@triton.jit
def _tanh(x):
    """tanh in float32. Triton's own needs a library that its interpreter lacks; the quotient cancels near zero."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0)))
    return tl.where(square < 0.01, near, tl.where(x < 0, -far, far))


@triton.jit
def _statistics(
    row_ptr, V, softcap, inverse_softcap,
    HAS_SOFTCAP: tl.constexpr, HAS_SUM: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(logsumexp, sum) of a row of logits, after the softcap."""
    offsets = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    top = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    logit_sum = tl.zeros((LANES,), tl.float32)
    for start in range(0, V, STEPS * LANES):
        mask = start + offsets < V
        x = tl.load(row_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_SOFTCAP:
            x = softcap * _tanh(x * inverse_softcap)
        if HAS_SUM:
            logit_sum += tl.sum(tl.where(mask, x, 0.0), 0)
        x = tl.where(mask, x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp2((top - higher) * LOG2E) + tl.sum(tl.exp2((x - higher[None, :]) * LOG2E), 0)
        top = higher
    highest = tl.max(top, 0)
    lse = highest + tl.log(tl.sum(total * tl.exp2((top - highest) * LOG2E), 0))
    return lse, tl.sum(logit_sum, 0)


@triton.jit
def _write_gradient(
    row_ptr, V, target, lse, scale, counts, z_loss, softcap, inverse_softcap, smoothing,
    HAS_SOFTCAP: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Overwrite a row of logits with scale times the gradient of its loss; with zeros if the row does not count."""
    offsets = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, V, STEPS * LANES):
        columns = start + offsets
        x = tl.load(row_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
        slope = 1.0
        if HAS_SOFTCAP:
            bent = _tanh(x * inverse_softcap)
            x = softcap * bent
            slope = 1.0 - bent * bent
        gradient = tl.exp2((x - lse) * LOG2E) * (1.0 + 2.0 * z_loss * lse) - smoothing / V
        gradient -= tl.where(columns == target, 1.0 - smoothing, 0.0)
        gradient = tl.where(counts, gradient * slope * scale, 0.0)
        tl.store(row_ptr + columns, gradient.to(row_ptr.dtype.element_ty), mask=columns < V)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, target_ptr, loss_ptr, lse_ptr, d_loss_ptr,
    V, row_stride, ignore_index, z_loss, softcap, inverse_softcap, smoothing,
    WITH_LOSS: tl.constexpr, WITH_GRADIENT: tl.constexpr, HAS_D_LOSS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    target = tl.load(target_ptr + row)
    counts = target != ignore_index
    # A target without a column (it can only be noticed on the device) gives NaN, and reads nothing outside the row.
    inside = (target >= 0) & (target < V)
    if WITH_LOSS:
        picked = tl.load(row_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
        if HAS_SOFTCAP:
            picked = softcap * _tanh(picked * inverse_softcap)
        lse, logit_sum = _statistics(row_ptr, V, softcap, inverse_softcap, HAS_SOFTCAP, HAS_SMOOTHING, STEPS, LANES)
        loss = lse - (1.0 - smoothing) * picked + z_loss * lse * lse - smoothing * (logit_sum / V)
        tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))
        tl.store(lse_ptr + row, lse)
    else:
        lse = tl.load(lse_ptr + row)
    if WITH_GRADIENT:
        scale = 1.0
        if HAS_D_LOSS:
            scale = tl.load(d_loss_ptr + row)
        _write_gradient(
            row_ptr, V, target, lse, scale, counts, z_loss, softcap, inverse_softcap, smoothing, HAS_SOFTCAP, STEPS, LANES
        )  # fmt: skip


@triton.jit
def _total_kernel(
    loss_ptr, target_ptr, total_ptr, factor_ptr, n_rows, ignore_index, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """total = the sum of loss (n_rows,), or its mean over the rows that count; factor = what the sum was multiplied by."""
    losses = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        losses += tl.load(loss_ptr + rows, mask=rows < n_rows, other=0.0)
        target = tl.load(target_ptr + rows, mask=rows < n_rows, other=ignore_index)
        count += (target != ignore_index).to(tl.int32)
    factor = 1.0
    if MEAN:
        factor = 1.0 / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(total_ptr, tl.sum(losses, 0) * factor)
    tl.store(factor_ptr, factor)


def size_bucket(V: int) -> int:
    return next((size for size in SIZES if size >= V), SIZES[-1])


def cross_entropy_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    """A thread holds one vector of 16 bytes (bfloat16) of each of STEPS lines; small vocabularies take few threads."""
    threads = 64 if size <= 2048 else 128 if size <= 16384 else 256
    return {"STEPS": 4, "LANES": 8 * threads, "num_warps": threads // target.lanes}


def cross_entropy_candidates(target: Target, dtype: torch.dtype, size: int) -> list[Config]:
    """For the tuner: 8 to 64 logits a thread, in one to eight lines."""
    return [
        {"STEPS": steps, "LANES": vectors * threads, "num_warps": threads // target.lanes}
        for threads in (64, 128, 256, 512, 1024)
        for vectors in (4, 8, 16)
        for steps in (1, 2, 4, 8)
        if 8 <= vectors * steps <= 64
    ]


FORMULAS = {"cross_entropy": cross_entropy_formula}
CANDIDATES = {"cross_entropy": cross_entropy_candidates}
# 16 bytes: what Triton 3.6 spills on sm_100 with every option on; 3.7 spills nothing.
BUDGETS = {"cross_entropy": Budget(registers=152, spilled_bytes=16), "total": Budget(registers=40)}


def cross_entropy_(
    logits: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, d_loss: Tensor | None,
    *, with_loss: bool, with_gradient: bool, ignore_index: int, z_loss: float, softcap: float | None, label_smoothing: float,
) -> None:  # fmt: skip
    """Per row of logits (C, V), whose last axis has no gaps: write the loss and lse (C,) float32 if with_loss (else lse is
    read), then overwrite the logits with their gradient, times d_loss (C,) if given, if with_gradient."""
    V = logits.shape[1]
    where = launch.target(logits.device)
    config = launch.config(
        "linear_cross_entropy", "cross_entropy", where, logits.dtype, size_bucket(V), cross_entropy_formula
    )
    launch.run(
        _cross_entropy_kernel, (logits.shape[0],), logits.device,
        logits, targets, losses, lse, lse if d_loss is None else d_loss,
        V, logits.stride(0), ignore_index, float(z_loss), softcap or 1.0, 1.0 / (softcap or 1.0), float(label_smoothing),
        WITH_LOSS=with_loss, WITH_GRADIENT=with_gradient, HAS_D_LOSS=d_loss is not None,
        HAS_SOFTCAP=softcap is not None, HAS_SMOOTHING=label_smoothing > 0, **config,
    )  # fmt: skip


def total(losses: Tensor, targets: Tensor, ignore_index: int, mean: bool) -> tuple[Tensor, Tensor]:
    """The sum or mean of losses (R,), and the factor that made it from the sum: float32 scalars."""
    out = torch.empty((), dtype=torch.float32, device=losses.device)
    factor = torch.empty((), dtype=torch.float32, device=losses.device)
    launch.run(
        _total_kernel, (1,), losses.device, losses, targets, out, factor, losses.shape[0], ignore_index,
        MEAN=mean, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out, factor
