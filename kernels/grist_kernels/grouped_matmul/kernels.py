"""Device code of grouped products: forward (and its gradient for x, with weights transposed), weights' and biases' gradients.

R rows sorted by expert, E experts. A program of the forward makes one tile of rows (grist_kernels.expert_rows) times one block
of columns. Rows beyond an expert's last are read as that last row once more, and not stored: no load of x needs a mask.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (Device code is Python by its looks only: the compiler gives names, loops and calls other types than Python has.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_and_block(program, n_tiles, n_blocks, GROUP: tl.constexpr):
    """Which tile of rows and which block of columns: GROUP tiles take a block in turn, so that its weights stay in L2."""
    in_group = GROUP * n_blocks
    first = program // in_group * GROUP
    tiles = tl.minimum(n_tiles - first, GROUP)
    inside = program % in_group
    return first + inside % tiles, inside // tiles


@triton.jit
def expert_tile(starts_ptr, tile_row_ptr, tile, expert, BLOCK_M: tl.constexpr):
    """(rows of a tile, the same with none beyond its expert's last, which of them are the expert's)."""
    rows = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    end = tl.load(starts_ptr + expert + 1)
    return rows, tl.minimum(rows, end - 1), rows < end


@triton.jit
def multiply(
    x_rows, w_columns, w_in, column_mask, acc, IN: tl.constexpr, BLOCK_K: tl.constexpr, MASK_COLUMNS: tl.constexpr
):
    """acc + x @ w. x_rows (M, 1) and w_columns (1, N): pointers to the first of IN elements, 1 and w_in apart."""
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_rows + inner[None, :]
    w_ptrs = w_columns + inner[:, None] * w_in
    for _ in range(IN // BLOCK_K):
        x = tl.load(x_ptrs)
        if MASK_COLUMNS:
            w = tl.load(w_ptrs, mask=column_mask, other=0.0)
        else:
            w = tl.load(w_ptrs)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * w_in
    if IN % BLOCK_K != 0:
        inside = inner < IN % BLOCK_K
        x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=inside[:, None] & column_mask, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def _forward_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, n_tiles, n_experts,
    x_stride, w_expert, w_in, w_out, b_expert,
    IN: tl.constexpr, OUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[r] = x[r] @ w[e] + bias[e] for the rows of expert e; zero for those of nobody, which is expert n_experts."""
    tile, block = tile_and_block(tl.program_id(0), n_tiles, tl.cdiv(OUT, BLOCK_N), GROUP)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    rows, read_rows, mine = expert_tile(starts_ptr, tile_row_ptr, tile, expert, BLOCK_M)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = (columns < OUT)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * OUT + columns[None, :]
    if expert >= n_experts:
        tl.store(out_ptrs, tl.zeros((BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty), mask=mine[:, None] & column_mask)
        return
    x_rows = x_ptr + read_rows.to(tl.int64)[:, None] * x_stride
    w_columns = w_ptr + expert.to(tl.int64) * w_expert + columns[None, :] * w_out
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = multiply(x_rows, w_columns, w_in, column_mask, acc, IN, BLOCK_K, OUT % BLOCK_N != 0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * b_expert + columns, mask=columns < OUT, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mine[:, None] & column_mask)


@triton.jit
def _rows_of(rows, pair_ptr, mask, ACTIVE: tl.constexpr):
    """Where the data of sorted rows lies: there, or (ACTIVE) at the token of each row's pair."""
    if ACTIVE > 0:
        rows = tl.load(pair_ptr + rows, mask=mask, other=0) // ACTIVE
    return rows.to(tl.int64)


@triton.jit
def _add_outer(
    x_ptr, dy_ptr, pair_ptr, rows, end, x_stride, dy_stride, x_columns, dy_columns, x_mask, dy_mask, acc,
    X_ACTIVE: tl.constexpr, DY_ACTIVE: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """acc + x[rows].T @ dy[rows]."""
    mask = rows < end
    x_ptrs = x_ptr + _rows_of(rows, pair_ptr, mask, X_ACTIVE)[:, None] * x_stride + x_columns
    dy_ptrs = dy_ptr + _rows_of(rows, pair_ptr, mask, DY_ACTIVE)[:, None] * dy_stride + dy_columns
    if MASK_ROWS:
        x_mask = x_mask & mask[:, None]
        dy_mask = dy_mask & mask[:, None]
    x = tl.load(x_ptrs, mask=x_mask, other=0.0)
    dy = tl.load(dy_ptrs, mask=dy_mask, other=0.0)
    return tl.dot(tl.trans(x), dy, acc, input_precision="ieee")


@triton.jit
def _outer_kernel(
    x_ptr, dy_ptr, dw_ptr, pair_ptr, starts_ptr, x_stride, dy_stride,
    IN: tl.constexpr, OUT: tl.constexpr, X_ACTIVE: tl.constexpr, DY_ACTIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dw[e] (IN, OUT) = x[rows of e].T @ dy[rows of e]: zero for an expert without rows.

    X_ACTIVE, DY_ACTIVE: 0, or how many experts a token has where that operand is stored by token."""
    blocks_m, blocks_n = tl.cdiv(IN, BLOCK_M), tl.cdiv(OUT, BLOCK_N)
    expert = tl.program_id(0) // (blocks_m * blocks_n)
    block_m, block_n = tile_and_block(tl.program_id(0) % (blocks_m * blocks_n), blocks_m, blocks_n, GROUP)
    x_columns = block_m * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    dy_columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    x_mask, dy_mask = x_columns < IN, dy_columns < OUT
    start, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
    whole = start + tl.maximum(end - start, 0) // BLOCK_K * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, whole, BLOCK_K):
        acc = _add_outer(
            x_ptr, dy_ptr, pair_ptr, first + tl.arange(0, BLOCK_K), end, x_stride, dy_stride, x_columns, dy_columns,
            x_mask, dy_mask, acc, X_ACTIVE, DY_ACTIVE, False,
        )  # fmt: skip
    if whole < end:
        acc = _add_outer(
            x_ptr, dy_ptr, pair_ptr, whole + tl.arange(0, BLOCK_K), end, x_stride, dy_stride, x_columns, dy_columns,
            x_mask, dy_mask, acc, X_ACTIVE, DY_ACTIVE, True,
        )  # fmt: skip
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    dw_ptrs = dw_ptr + expert.to(tl.int64) * IN * OUT + rows * OUT + dy_columns
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=(rows < IN) & dy_mask)


@triton.jit
def _segment_sum_kernel(
    dy_ptr, weight_ptr, sum_ptr, pair_ptr, starts_ptr, dy_stride,
    OUT: tl.constexpr, ACTIVE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of each expert's rows of dy, each times its pair's weight if there are weights."""
    blocks = tl.cdiv(OUT, BLOCK)
    expert = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    start, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(start, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = rows < end
        dy_ptrs = dy_ptr + _rows_of(rows, pair_ptr, mask, ACTIVE)[:, None] * dy_stride + columns
        dy = tl.load(dy_ptrs, mask=mask[:, None] & (columns < OUT), other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            pairs = tl.load(pair_ptr + rows, mask=mask, other=0)
            dy *= tl.load(weight_ptr + pairs, mask=mask, other=0.0).to(tl.float32)[:, None]
        total += dy
    out = tl.sum(total, 0)[None, :].to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + expert.to(tl.int64) * OUT + columns, out, mask=columns < OUT)
