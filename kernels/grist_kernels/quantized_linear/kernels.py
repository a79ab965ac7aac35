"""Device code of a linear layer with a packed weight: codes leave memory as they are, and are decoded in registers.

M rows, O outputs, I inputs. A program makes BLOCK_M rows of BLOCK_N outputs, from all inputs or, where few rows make too few
programs, from a share of them; shares are added in their order by a second kernel, for the same bits on every run. Rows and
outputs beyond the last are read as that last one once more, and not stored.

Four bits come in words of eight, the first code in the lowest bits, and are decoded in pairs: a code behind the bits of 128 in
bfloat16 is 128 + code, exactly, and so is the difference to 128 + zero. grist_kernels.moe_mxfp4.kernels decodes MXFP4.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (Device code is Python by its looks only: the compiler gives names, loops and calls other types than Python has.)

from __future__ import annotations

import triton
import triton.language as tl

from grist_kernels.moe_mxfp4.kernels import decoded

INT8, FP8, INT4, MXFP4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
E4M3_UNIT = tl.constexpr(2.0**120)


@triton.jit
def _pair(words, FIRST: tl.constexpr):
    """128 + code of FIRST and of FIRST + 4 of each word: two bfloat16, in a new last axis."""
    both = ((words >> (4 * FIRST)) & 0x000F000F) | 0x43004300
    low = both.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (both >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def decoded_int4(words, scales, zeros, N: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, dtype: tl.constexpr):
    """words (N, K / 8) int32, scales and zeros (N, GROUPS) -> (code - zero) * scale, (N, K) of a type, in their order."""
    words = words.to(tl.uint32, bitcast=True)
    even = tl.join(_pair(words, 0), _pair(words, 2))
    odd = tl.join(_pair(words, 1), _pair(words, 3))
    values = tl.reshape(tl.join(even, odd), (N, GROUPS, K // GROUPS)).to(tl.float32)
    values = (values - (zeros.to(tl.float32) + 128.0)[:, :, None]) * scales.to(tl.float32)[:, :, None]
    return tl.reshape(values, (N, K)).to(dtype)


@triton.jit
def decoded_fp8(codes, dtype: tl.constexpr):
    """E4M3 as uint8 -> a type: the bits, put below float32's sign, are the number times 2**-120; all ones are NaN."""
    codes = codes.to(tl.uint32)
    magnitudes = codes & 0x7F
    values = (((codes & 0x80) << 24) | (magnitudes << 20)).to(tl.float32, bitcast=True) * E4M3_UNIT
    return tl.where(magnitudes == 0x7F, float("nan"), values).to(dtype)


@triton.jit
def _weights(
    codes_ptr, scales_ptr, zeros_ptr, rows, start,
    IN: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, HAS_ZEROS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The inputs from start on of some rows (N,) int64: (N, BLOCK_K), without rows' scales. WHOLE: none is beyond the last."""
    if GROUP == 1:  # eight bits: a scale a row
        inner = start + tl.arange(0, BLOCK_K)[None, :]
        if WHOLE:
            codes = tl.load(codes_ptr + (rows * IN)[:, None] + inner)
        else:
            codes = tl.load(codes_ptr + (rows * IN)[:, None] + inner, mask=inner < IN, other=0)
        if KIND == FP8:
            w = decoded_fp8(codes, dtype)
        else:
            w = codes.to(dtype)
    else:
        word = start // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
        if WHOLE:
            words = tl.load(codes_ptr + (rows * (IN // 8))[:, None] + word)
        else:
            words = tl.load(codes_ptr + (rows * (IN // 8))[:, None] + word, mask=word < IN // 8, other=0)
        SPAN: tl.constexpr = GROUP if GROUP < BLOCK_K else BLOCK_K
        group = (start + tl.arange(0, BLOCK_K // SPAN)[None, :] * SPAN) // GROUP
        at = (rows * (IN // GROUP))[:, None] + group
        scales = tl.load(scales_ptr + at, mask=group < IN // GROUP, other=0)
        if KIND == MXFP4:
            w = decoded(words, scales, BLOCK_N, BLOCK_K, dtype)
        else:
            if HAS_ZEROS:
                zeros = tl.load(zeros_ptr + at, mask=group < IN // GROUP, other=0)
            else:
                zeros = tl.full((BLOCK_N, BLOCK_K // SPAN), 8, tl.uint8)
            w = decoded_int4(words, scales, zeros, BLOCK_N, BLOCK_K, BLOCK_K // SPAN, dtype)
    return w


@triton.jit
def _forward_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, M, OUT, x_stride,
    IN: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SHARES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (SHARES, M, OUT): products with shares of the inputs, times the scales of rows; with the bias if it is the only one.

    Programs beside each other have the same weights.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tiles = tl.cdiv(M, BLOCK_M)
    tile, block, share = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    read_columns = tl.minimum(columns, OUT - 1).to(tl.int64)
    x_ptrs = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * x_stride + tl.arange(0, BLOCK_K)[None, :]
    STEPS: tl.constexpr = IN // BLOCK_K
    EACH: tl.constexpr = (STEPS + SHARES - 1) // SHARES
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(share * EACH, tl.minimum(share * EACH + EACH, STEPS)):
        start = step * BLOCK_K
        x = tl.load(x_ptrs + start)
        w = _weights(
            codes_ptr,
            scales_ptr,
            zeros_ptr,
            read_columns,
            start,
            IN,
            KIND,
            GROUP,
            HAS_ZEROS,
            True,
            BLOCK_N,
            BLOCK_K,
            dtype,
        )
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if IN % BLOCK_K != 0:  # noqa: SIM102 (the first is decided by the compiler)
        if share == SHARES - 1:
            start = STEPS * BLOCK_K
            x = tl.load(x_ptrs + start, mask=start + tl.arange(0, BLOCK_K)[None, :] < IN, other=0.0)
            w = _weights(
                codes_ptr, scales_ptr, zeros_ptr, read_columns, start, IN, KIND, GROUP, HAS_ZEROS, False, BLOCK_N, BLOCK_K,
                dtype,
            )  # fmt: skip
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if GROUP == 1:  # eight bits: a scale a row
        acc *= tl.load(scales_ptr + read_columns)[None, :]
    if HAS_BIAS and SHARES == 1:
        acc += tl.load(bias_ptr + read_columns).to(tl.float32)[None, :]
    out_ptrs = out_ptr + (share.to(tl.int64) * M + rows)[:, None] * OUT + columns[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < OUT)[None, :])


@triton.jit
def _add_shares_kernel(
    shares_ptr, bias_ptr, out_ptr, count, OUT, HAS_BIAS: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr
):
    """out (count,) = the sum of shares (SHARES, count) in their order, and the bias (OUT,) of each row."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for share in range(SHARES):
        total += tl.load(shares_ptr + tl.full((), share, tl.int64) * count + at, mask=at < count, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % OUT, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < count)
