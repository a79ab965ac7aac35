"""Device code of the mixture-of-experts layer around its plain grouped products (grist_kernels.grouped_matmul.kernels).

T tokens, D model width, E experts, A active experts per token, F expert width, R rows sorted by expert. A pair is a token and
one of its A choices. What is fused with what, and why, is in triton_kernel.py.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (Device code is Python by its looks only: the compiler gives names, loops and calls other types than Python has.)

from __future__ import annotations

import triton
import triton.language as tl

from grist_kernels.grouped_matmul.kernels import expert_tile, multiply, tile_and_block
from grist_kernels.swiglu.triton_kernel import gate_and_up, slopes


@triton.jit
def _multiply_halves(
    x_rows, gate_columns, w_in, column_mask, gate, up, D: tl.constexpr, F: tl.constexpr, w_out,
    BLOCK_K: tl.constexpr, MASK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """gate + x @ w and up + x @ w', where w' are the columns F further on: x is read once for both."""
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_rows + inner[None, :]
    gate_ptrs = gate_columns + inner[:, None] * w_in
    up_ptrs = gate_ptrs + w_out * F
    for _ in range(D // BLOCK_K):
        x = tl.load(x_ptrs)
        if MASK_COLUMNS:
            w_gate = tl.load(gate_ptrs, mask=column_mask, other=0.0)
            w_up = tl.load(up_ptrs, mask=column_mask, other=0.0)
        else:
            w_gate = tl.load(gate_ptrs)
            w_up = tl.load(up_ptrs)
        gate = tl.dot(x, w_gate, gate, input_precision="ieee")
        up = tl.dot(x, w_up, up, input_precision="ieee")
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K * w_in
        up_ptrs += BLOCK_K * w_in
    if D % BLOCK_K != 0:
        inside = inner < D % BLOCK_K
        mask = inside[:, None] & column_mask
        x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
        gate = tl.dot(x, tl.load(gate_ptrs, mask=mask, other=0.0), gate, input_precision="ieee")
        up = tl.dot(x, tl.load(up_ptrs, mask=mask, other=0.0), up, input_precision="ieee")
    return gate, up


@triton.jit
def _load_bias(bias_ptr, expert, b_expert, columns, mask):
    bias = tl.load(bias_ptr + expert.to(tl.int64) * b_expert + columns, mask=mask, other=0.0)
    return bias.to(tl.float32)[None, :]


@triton.jit
def _gate_up_kernel(
    x_ptr, w_ptr, bias_ptr, h_ptr, act_ptr, pair_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, n_tiles,
    x_stride, w_expert, w_in, w_out, b_expert, alpha, limit,
    D: tl.constexpr, F: tl.constexpr, ACTIVE: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """act[r] = swiglu(h[r]), h[r] = x[token of r] @ w[e] + bias[e]; h is stored only where a gradient will need it."""
    BLOCK_F: tl.constexpr = BLOCK_N // 2
    tile, block = tile_and_block(tl.program_id(0), n_tiles, tl.cdiv(F, BLOCK_F), GROUP)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    rows, read_rows, mine = expert_tile(starts_ptr, tile_row_ptr, tile, expert, BLOCK_M)
    tokens = tl.load(pair_ptr + read_rows) // ACTIVE
    x_rows = x_ptr + tokens.to(tl.int64)[:, None] * x_stride
    w_ptr += expert.to(tl.int64) * w_expert
    columns = block * BLOCK_F + tl.arange(0, BLOCK_F)
    column_mask = columns < F
    out_rows = rows.to(tl.int64)[:, None]
    element = act_ptr.dtype.element_ty
    if INTERLEAVED:
        wide = block * BLOCK_N + tl.arange(0, BLOCK_N)
        wide_mask = wide < 2 * F
        h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        h = multiply(
            x_rows, w_ptr + wide[None, :] * w_out, w_in, wide_mask[None, :], h, D, BLOCK_K, 2 * F % BLOCK_N != 0
        )
        if HAS_BIAS:
            h += _load_bias(bias_ptr, expert, b_expert, wide, wide_mask)
        if KEEP:
            h_ptrs = h_ptr + out_rows * (2 * F) + wide[None, :]
            tl.store(h_ptrs, h.to(element), mask=mine[:, None] & wide_mask[None, :])
        gate, up = tl.split(tl.reshape(h, (BLOCK_M, BLOCK_F, 2)))
    else:
        gate = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        gate, up = _multiply_halves(
            x_rows, w_ptr + columns[None, :] * w_out, w_in, column_mask[None, :], gate, up, D, F, w_out, BLOCK_K,
            F % BLOCK_F != 0,
        )  # fmt: skip
        if HAS_BIAS:
            gate += _load_bias(bias_ptr, expert, b_expert, columns, column_mask)
            up += _load_bias(bias_ptr + F, expert, b_expert, columns, column_mask)
        if KEEP:
            h_ptrs = h_ptr + out_rows * (2 * F) + columns[None, :]
            tl.store(h_ptrs, gate.to(element), mask=mine[:, None] & column_mask[None, :])
            tl.store(h_ptrs + F, up.to(element), mask=mine[:, None] & column_mask[None, :])
    clamped, sigmoid, shifted = gate_and_up(gate, up, alpha, limit, HAS_ALPHA, HAS_LIMIT)
    act_ptrs = act_ptr + out_rows * F + columns[None, :]
    tl.store(act_ptrs, (clamped * sigmoid * shifted).to(element), mask=mine[:, None] & column_mask[None, :])


@triton.jit
def _halved(parts, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """COUNT tiles (ROWS, COLUMNS) of neighbouring columns as twice as many of half the columns; nothing leaves registers."""
    finer = ()
    for i in tl.static_range(COUNT):
        left, right = tl.split(tl.permute(tl.reshape(parts[i], (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        finer = finer + (left, right)
    return finer


@triton.jit
def _finish_part(
    p, first, weight, rows, mine, h_ptr, d_h_ptr, act_ptr, alpha, limit, F: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store d_h and weight * act of the BLOCK columns from `first` on, whose p is given -> the rows' sums of act * p."""
    columns = first + tl.arange(0, BLOCK)[None, :]
    mask = mine[:, None] & (columns < F)
    h_rows = rows.to(tl.int64)[:, None] * (2 * F)
    element = d_h_ptr.dtype.element_ty
    if INTERLEAVED:
        wide = 2 * first + tl.arange(0, 2 * BLOCK)[None, :]
        wide_mask = mine[:, None] & (wide < 2 * F)
        h = tl.load(h_ptr + h_rows + wide, mask=wide_mask, other=0.0)
        gate, up = tl.split(tl.reshape(h, (BLOCK_M, BLOCK, 2)))
    else:
        gate = tl.load(h_ptr + h_rows + columns, mask=mask, other=0.0)
        up = tl.load(h_ptr + h_rows + F + columns, mask=mask, other=0.0)
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    clamped, sigmoid, shifted = gate_and_up(gate, up, alpha, limit, HAS_ALPHA, HAS_LIMIT)
    act = clamped * sigmoid * shifted
    tl.store(act_ptr + rows.to(tl.int64)[:, None] * F + columns, (act * weight).to(element), mask=mask)
    d_gate, d_up = slopes(p * weight, gate, up, alpha, limit, HAS_ALPHA, HAS_LIMIT)
    if INTERLEAVED:
        both = tl.reshape(tl.join(d_gate.to(element), d_up.to(element)), (BLOCK_M, 2 * BLOCK))
        tl.store(d_h_ptr + h_rows + wide, both, mask=wide_mask)
    else:
        tl.store(d_h_ptr + h_rows + columns, d_gate.to(element), mask=mask)
        tl.store(d_h_ptr + h_rows + F + columns, d_up.to(element), mask=mask)
    return tl.sum(act * p, 1)  # columns beyond F have p = 0


@triton.jit
def _d_hidden_kernel(
    d_out_ptr, w_ptr, h_ptr, weights_ptr, d_h_ptr, act_ptr, partial_ptr, pair_ptr, starts_ptr, tile_expert_ptr,
    tile_row_ptr, n_tiles, n_rows, d_stride, w_expert, w_in, w_out, alpha, limit,
    D: tl.constexpr, F: tl.constexpr, ACTIVE: tl.constexpr,
    HAS_ALPHA: tl.constexpr, HAS_LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """From p = d_out[token] @ w_down[e].T, the gradient of the activation before the pair's weight: d_h, weight * act, and
    sum(act * p) over this program's columns, which is its share of the weight's gradient (SonicMoE, Guo et al., 2025).

    PARTS: 1, 2 or 4 pieces of the columns one after another, for all of them at once would not fit into registers."""
    tile, block = tile_and_block(tl.program_id(0), n_tiles, tl.cdiv(F, BLOCK_N), GROUP)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    rows, read_rows, mine = expert_tile(starts_ptr, tile_row_ptr, tile, expert, BLOCK_M)
    pairs = tl.load(pair_ptr + read_rows)
    d_rows = d_out_ptr + (pairs // ACTIVE).to(tl.int64)[:, None] * d_stride
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    w_columns = w_ptr + expert.to(tl.int64) * w_expert + columns * w_out
    p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    p = multiply(d_rows, w_columns, w_in, columns < F, p, D, BLOCK_K, F % BLOCK_N != 0)
    parts = (p,)
    if PARTS > 1:
        parts = _halved(parts, 1, BLOCK_M, BLOCK_N)
    if PARTS > 2:
        parts = _halved(parts, 2, BLOCK_M, BLOCK_N // 2)
    weight = tl.load(weights_ptr + pairs).to(tl.float32)[:, None]
    share = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(PARTS):
        share += _finish_part(
            parts[i], block * BLOCK_N + i * (BLOCK_N // PARTS), weight, rows, mine, h_ptr, d_h_ptr, act_ptr, alpha,
            limit, F, HAS_ALPHA, HAS_LIMIT, INTERLEAVED, BLOCK_N // PARTS, BLOCK_M,
        )  # fmt: skip
    # In 32 bits: there are BLOCK_N times fewer shares than activations.
    tl.store(partial_ptr + block * n_rows + rows, share, mask=mine)


@triton.jit
def _combine_kernel(
    y_ptr, weights_ptr, place_ptr, out_ptr, n_tokens,
    D: tl.constexpr, ACTIVE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over a of weights[t, a] * y[place[t, a]], in that order; NaN where a choice was no expert (place -1)."""
    blocks = tl.cdiv(D, BLOCK)
    tokens = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    known_tokens = tokens < n_tokens
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for active in range(ACTIVE):
        pairs = tokens * ACTIVE + active
        places = tl.load(place_ptr + pairs, mask=known_tokens, other=0)
        mask = (known_tokens & (places >= 0))[:, None] & (columns < D)
        y = tl.load(y_ptr + places.to(tl.int64)[:, None] * D + columns, mask=mask, other=float("nan")).to(tl.float32)
        if HAS_WEIGHTS:
            y *= tl.load(weights_ptr + pairs, mask=known_tokens, other=0.0).to(tl.float32)[:, None]
        total += y
    out_ptrs = out_ptr + tokens.to(tl.int64)[:, None] * D + columns
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=known_tokens[:, None] & (columns < D))


@triton.jit
def _d_weights_kernel(
    partial_ptr, d_out_ptr, bias_ptr, ids_ptr, place_ptr, d_weights_ptr, n_pairs, n_rows, n_partials, d_stride, b_expert,
    D: tl.constexpr, ACTIVE: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_weights[t, a] = sum of the pair's partial sums (_d_hidden_kernel) + d_out[t] . b_down[e]."""
    pairs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    places = tl.load(place_ptr + pairs, mask=pairs < n_pairs, other=-1)
    known = places >= 0
    total = tl.zeros((ROWS,), tl.float32)
    for number in range(n_partials):
        total += tl.load(partial_ptr + number * n_rows + places, mask=known, other=float("nan"))
    if HAS_BIAS:
        experts = tl.load(ids_ptr + pairs, mask=known, other=0).to(tl.int64)
        d_rows = d_out_ptr + (pairs // ACTIVE).to(tl.int64)[:, None] * d_stride
        bias_rows = bias_ptr + experts[:, None] * b_expert
        products = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, D, BLOCK):
            columns = first + tl.arange(0, BLOCK)[None, :]
            mask = known[:, None] & (columns < D)
            d_out = tl.load(d_rows + columns, mask=mask, other=0.0).to(tl.float32)
            products += d_out * tl.load(bias_rows + columns, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(products, 1)
    tl.store(d_weights_ptr + pairs, total.to(d_weights_ptr.dtype.element_ty), mask=pairs < n_pairs)
