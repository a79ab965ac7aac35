"""Inside kernels: where the rows of a tensor begin. Needs triton, which grist_kernels.rows, its other half, does not."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_offsets(rows, inner, outer_stride, inner_stride):
    """Where rows begin (grist_kernels.rows), in 64 bits: a row's number times its stride leaves 32 bits at 2**31 elements."""
    outer = (rows // inner).to(tl.int64) * outer_stride
    return outer + (rows % inner).to(tl.int64) * inner_stride
