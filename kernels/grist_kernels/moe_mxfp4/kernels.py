"""Device code of experts whose weights are MXFP4: grouped products that decode their weights on the way to the matrix units.

D model width, F expert width, R rows sorted by expert. A program makes one tile of rows (grist_kernels.expert_rows) times one
block of columns, and columns of a product are rows of the weights: (out, in), eight values to a 32-bit word, the first in the
lowest bits. Columns beyond the last are read as that last one once more, and not stored: no load of weights needs a mask.

Few rows make this a matter of memory, and next of instructions: in the time that a weight needs to arrive (4.8 TB/s), an
H200's lanes have four. So values are decoded in pairs. A value's bits, sign e e m, go to where bfloat16 has its sign, the
lowest two bits of its exponent and the highest of its mantissa. That is the value times 2**-126, subnormals included. Two
products, both exact, make it right: by 2**126, and by the scale. Whatever MXFP4 can say and float32 can hold is a bfloat16.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (Device code is Python by its looks only: the compiler gives names, loops and calls other types than Python has.)

from __future__ import annotations

import triton
import triton.language as tl

from grist_kernels.grouped_matmul.kernels import expert_tile, tile_and_block
from grist_kernels.swiglu.triton_kernel import gate_and_up

UNIT: tl.constexpr = tl.constexpr(2.0**126)


@triton.jit
def _pair(words, FIRST: tl.constexpr):
    """Values FIRST and FIRST + 4 of each word, times 2**-126: two bfloat16, in a new last axis."""
    signs = words << (12 - 4 * FIRST)
    if FIRST < 2:
        magnitudes = words << (6 - 4 * FIRST)
    else:
        magnitudes = words >> (4 * FIRST - 6)
    both = (signs & 0x80008000) | (magnitudes & 0x01C001C0)
    low = both.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (both >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _powers(scales):
    """2**(s - 127) as bfloat16: s is the exponent's field. 0 is subnormal and 255 NaN, which takes a mantissa bit each."""
    scales = scales.to(tl.uint16)
    bits = scales << 7
    return tl.where((scales == 0) | (scales == 255), bits | 0x40, bits).to(tl.bfloat16, bitcast=True)


@triton.jit
def decoded(words, scales, N: tl.constexpr, K: tl.constexpr, dtype: tl.constexpr):
    """words (N, K / 8) int32, scales (N, K / 32) uint8 -> weights (N, K) of a type, in their order."""
    words = words.to(tl.uint32, bitcast=True)
    even = tl.join(_pair(words, 0), _pair(words, 2))
    odd = tl.join(_pair(words, 1), _pair(words, 3))
    values = tl.reshape(tl.join(even, odd), (N, K // 32, 32)) * UNIT
    values = tl.reshape(values * _powers(scales)[:, :, None], (N, K))
    if dtype != tl.bfloat16:
        values = values.to(tl.float32).to(dtype)
    return values


@triton.jit
def multiply(
    x_rows, words_ptr, scales_ptr, columns, acc, IN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """acc + x @ w.T. x_rows (M, 1): pointers to the first of IN elements; columns (N,): rows of w, none beyond its last.

    Scales are a few bytes, not aligned to what an asynchronous copy takes: each block's are asked for a block ahead.
    """
    dtype: tl.constexpr = x_rows.dtype.element_ty
    inner = tl.arange(0, BLOCK_K)
    word = tl.arange(0, BLOCK_K // 8)[None, :]
    block = tl.arange(0, BLOCK_K // 32)[None, :]
    x_ptrs = x_rows + inner[None, :]
    word_ptrs = words_ptr + (columns[:, None] * (IN // 8) + word)
    scale_ptrs = scales_ptr + (columns[:, None] * (IN // 32) + block)
    scales = tl.load(scale_ptrs, mask=block < IN // 32, other=0)
    for step in range(IN // BLOCK_K):
        scale_ptrs += BLOCK_K // 32
        later = (step + 1) * (BLOCK_K // 32) + block
        next_scales = tl.load(scale_ptrs, mask=later < IN // 32, other=0)
        x = tl.load(x_ptrs)
        w = decoded(tl.load(word_ptrs), scales, BLOCK_N, BLOCK_K, dtype)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        word_ptrs += BLOCK_K // 8
        scales = next_scales
    if IN % BLOCK_K != 0:
        x = tl.load(x_ptrs, mask=inner[None, :] < IN % BLOCK_K, other=0.0)
        words = tl.load(word_ptrs, mask=word < IN % BLOCK_K // 8, other=0)
        w = decoded(words, scales, BLOCK_N, BLOCK_K, dtype)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def _gate_up_kernel(
    x_ptr, words_ptr, scales_ptr, bias_ptr, act_ptr, pair_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, n_tiles,
    x_stride, b_expert, alpha, limit,
    D: tl.constexpr, F: tl.constexpr, ACTIVE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """act[r] = swiglu(x[token of r] @ w[e].T + bias[e]). Within a program gates and ups alternate, however they are stored."""
    BLOCK_F: tl.constexpr = BLOCK_N // 2
    tile, block = tile_and_block(tl.program_id(0), n_tiles, tl.cdiv(F, BLOCK_F), GROUP)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    rows, read_rows, mine = expert_tile(starts_ptr, tile_row_ptr, tile, expert, BLOCK_M)
    tokens = tl.load(pair_ptr + read_rows) // ACTIVE
    x_rows = x_ptr + tokens.to(tl.int64)[:, None] * x_stride
    wide = tl.arange(0, BLOCK_N)
    features = tl.minimum(block * BLOCK_F + wide // 2, F - 1)
    if INTERLEAVED:
        columns = features * 2 + wide % 2
    else:
        columns = features + wide % 2 * F
    first = expert.to(tl.int64) * (2 * F)
    h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h = multiply(x_rows, words_ptr + first * (D // 8), scales_ptr + first * (D // 32), columns, h, D, BLOCK_N, BLOCK_K)
    if HAS_BIAS:
        h += tl.load(bias_ptr + expert.to(tl.int64) * b_expert + columns).to(tl.float32)[None, :]
    gate, up = tl.split(tl.reshape(h, (BLOCK_M, BLOCK_F, 2)))
    gate, sigmoid, up = gate_and_up(gate, up, alpha, limit, HAS_ALPHA, HAS_LIMIT)
    out_columns = block * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    act_ptrs = act_ptr + rows.to(tl.int64)[:, None] * F + out_columns
    tl.store(act_ptrs, (gate * sigmoid * up).to(act_ptr.dtype.element_ty), mask=mine[:, None] & (out_columns < F))


@triton.jit
def _down_kernel(
    x_ptr, words_ptr, scales_ptr, bias_ptr, out_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, n_tiles, b_expert,
    IN: tl.constexpr, OUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[r] = x[r] @ w[e].T + bias[e] for the rows of expert e; x is contiguous."""
    tile, block = tile_and_block(tl.program_id(0), n_tiles, tl.cdiv(OUT, BLOCK_N), GROUP)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    rows, read_rows, mine = expert_tile(starts_ptr, tile_row_ptr, tile, expert, BLOCK_M)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    read_columns = tl.minimum(columns, OUT - 1)
    x_rows = x_ptr + read_rows.to(tl.int64)[:, None] * IN
    first = expert.to(tl.int64) * OUT
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    out = multiply(
        x_rows, words_ptr + first * (IN // 8), scales_ptr + first * (IN // 32), read_columns, out, IN, BLOCK_N, BLOCK_K
    )
    if HAS_BIAS:
        out += tl.load(bias_ptr + expert.to(tl.int64) * b_expert + read_columns).to(tl.float32)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * OUT + columns[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mine[:, None] & (columns < OUT)[None, :])
