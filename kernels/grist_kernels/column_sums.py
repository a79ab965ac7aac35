"""Sums over the rows of partial results, in a fixed order: how kernels add what many programs share, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grist_kernels import launch
from grist_kernels.launch import cdiv


@triton.jit
def _reduce_kernel(partial_ptr, sum_ptr, n_partials, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for row in range(0, n_partials, ROWS):
        rows = row + tl.arange(0, ROWS)[:, None]
        mask = (rows < n_partials) & (columns < D)
        total += tl.load(partial_ptr + rows.to(tl.int64) * D + columns, mask=mask, other=0.0)
    tl.store(sum_ptr + columns, tl.sum(total, 0)[None, :].to(sum_ptr.dtype.element_ty), mask=columns < D)


def sum_rows(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """partial (n, D) float32 without gaps -> its sum over the rows (D,) in a type."""
    n_partials, D = partial.shape
    total = torch.empty(D, dtype=dtype, device=partial.device)
    grid = (cdiv(D, 32),)
    launch.run(_reduce_kernel, grid, partial.device, partial, total, n_partials, D, ROWS=256, BLOCK=32, num_warps=8)
    return total
