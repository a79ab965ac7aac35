"""Flash attention in Triton: the device code. B batch, T time, N query and K key heads, H head width.

Query i stands at position i + offset among the keys and sees the keys from first(i) to its own position. Without packing
first(i) follows from the window; with packing it is read from `bounds`, which also says, for every key, where the queries that
see it end. Blocks of keys that no query of a program sees are never visited, and blocks that all of them see are not masked.

Forward: online softmax (Milakov and Gimelshein, 2018; Dao et al., "FlashAttention", 2022) in powers of two, started at
(sink, 1). Backward: one kernel for dq, which also makes delta = rowsum(d_out * out) - d_lse and each program's share of
d_sinks, and one for dk and dv, in which the query heads of a group follow each other: no scratch a head, no atomics.
Both walk in two loops, over the blocks that need a mask and over those that do not; more loops cost registers.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# (Device code is Python by its looks only: the compiler gives names, loops and calls other types than Python has.)

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOWEST: tl.constexpr = tl.constexpr(-1e30)  # below any logit, and finite: -inf - -inf is NaN


@triton.jit
def _bounds_kernel(
    cu_seqlens_ptr, first_ptr, beyond_ptr, T, window, n_sequences, steps, HAS_WINDOW: tl.constexpr, BLOCK: tl.constexpr
):
    """For each of T packed tokens the first key that it sees, and the end of the queries that see it: (T,) int32 each."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), tl.int32)  # the last sequence that starts at or before the token, by bisection
    high = tl.zeros((BLOCK,), tl.int32) + n_sequences
    for _ in range(steps):
        middle = (low + high) // 2
        starts = tl.load(cu_seqlens_ptr + middle).to(tl.int32)
        before = starts <= tokens
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    first = tl.load(cu_seqlens_ptr + low).to(tl.int32)
    beyond = tl.load(cu_seqlens_ptr + tl.minimum(low + 1, n_sequences)).to(tl.int32)
    if HAS_WINDOW:
        first = tl.maximum(first, tokens - window + 1)
        beyond = tl.minimum(beyond, tokens + window)
    tl.store(first_ptr + tokens, first, mask=tokens < T)
    tl.store(beyond_ptr + tokens, beyond, mask=tokens < T)


@triton.jit
def _tile(
    x, batch, start, head, T, batch_stride, time_stride, head_stride,
    MASKED: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Rows start to start + ROWS of one head: (ROWS, HEAD), zero beyond T (if MASKED) and beyond H."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, HEAD)[None, :]
    # One number of 64 bits, and a tile of 32 bits that is the same in every turn of a loop: half the registers.
    x += batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride + start.to(tl.int64) * time_stride
    pointers = x + (rows * time_stride + columns)
    if MASKED:
        return tl.load(pointers, mask=(rows < T - start) & (columns < H), other=0.0)
    if H < HEAD:
        return tl.load(pointers, mask=columns < H, other=0.0)
    return tl.load(pointers)


@triton.jit
def _block(
    x, batch, start, head, T, batch_stride, time_stride, head_stride,
    MASKED: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """_tile of a pointer, or of a descriptor of (batch, head, time, H), which needs no mask: what lies outside is zero."""
    if DESCRIPTORS:
        return x.load([batch, head, start, 0]).reshape([ROWS, HEAD])
    else:  # noqa: RET505 - what follows a return is compiled all the same, and a descriptor is no pointer
        return _tile(x, batch, start, head, T, batch_stride, time_stride, head_stride, MASKED, ROWS, H, HEAD)


@triton.jit
def _first_key(rows, bounds_ptr, T, offset, window, PACKED: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The first key that each query sees."""
    if PACKED:
        return tl.load(bounds_ptr + rows, mask=rows < T, other=0)
    if HAS_WINDOW:
        return tl.maximum(rows + offset - window + 1, 0)
    return tl.zeros_like(rows)


@triton.jit
def _key_range(
    start, bounds_ptr, T, T_keys, offset, window,
    PACKED: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(low, full_low, full_high, high): the keys that a block of queries sees, and between full_low and full_high those that
    all of its queries see, in whole blocks of keys."""
    last = tl.minimum(start + BLOCK_Q, T) - 1
    high = tl.minimum(last + offset + 1, T_keys)
    full_high = tl.maximum(tl.minimum(start + offset + 1, T_keys), 0) // BLOCK_K * BLOCK_K
    low = start * 0
    full_low = start * 0
    if PACKED:
        low = tl.load(bounds_ptr + start) // BLOCK_K * BLOCK_K
        full_low = tl.cdiv(tl.load(bounds_ptr + last), BLOCK_K) * BLOCK_K
    elif HAS_WINDOW:
        first = tl.maximum(start + offset - window + 1, 0)
        low = first // BLOCK_K * BLOCK_K
        high = tl.where(first < high, high, low)  # all of these keys may be too old, and then none is read
        full_low = tl.cdiv(tl.maximum(last + offset - window + 1, 0), BLOCK_K) * BLOCK_K
    # Where no block is seen by all, the blocks before the (empty) inside are all there are.
    full_low = tl.minimum(full_low, tl.maximum(tl.cdiv(high, BLOCK_K) * BLOCK_K, low))
    return low, full_low, tl.maximum(full_high, full_low), high


@triton.jit
def _visible(rows, columns, first, T_keys, offset):
    """Which keys (columns) which queries (rows) see; rows, columns and first broadcast against each other."""
    return (columns <= rows + offset) & (columns >= first) & (columns < T_keys)


@triton.jit
def _forward_steps(
    acc, total, top, q, k, v, batch, head, rows, first, first_start, n_first, second_start, n_blocks, T_keys, offset,
    scale, k_batch, k_time, k_head, v_batch, v_time, v_head,
    MASKED: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The online softmax over n_first blocks of keys from first_start on, and the rest of n_blocks from second_start on."""
    for step in range(n_blocks):
        begin = tl.where(step < n_first, first_start + step * BLOCK_K, second_start + (step - n_first) * BLOCK_K)
        k_tile = _block(k, batch, begin, head, T_keys, k_batch, k_time, k_head, MASKED, BLOCK_K, H, HEAD, DESCRIPTORS)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        if MASKED:
            columns = begin + tl.arange(0, BLOCK_K)
            visible = _visible(rows[:, None], columns[None, :], first[:, None], T_keys, offset)
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        v_tile = _block(v, batch, begin, head, T_keys, v_batch, v_time, v_head, MASKED, BLOCK_K, H, HEAD, DESCRIPTORS)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        top = higher
    return acc, total, top


@triton.jit
def _forward_kernel(
    q, k, v, out_ptr, lse_ptr, sink_ptr, bounds_ptr,
    T, T_keys, N, offset, window, scale,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
    GROUP: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0) // N
    head = tl.program_id(0) % N
    start = (
        tl.num_programs(1) - 1 - tl.program_id(1)
    ) * BLOCK_Q  # the longest rows first: the last to start are the shortest
    rows = start + tl.arange(0, BLOCK_Q)
    first = _first_key(rows, bounds_ptr, T, offset, window, PACKED, HAS_WINDOW)
    low, full_low, full_high, high = _key_range(
        start, bounds_ptr, T, T_keys, offset, window, PACKED, HAS_WINDOW, BLOCK_Q, BLOCK_K
    )  # fmt: skip
    q_tile = _tile(q, batch, start, head, T, q_batch, q_time, q_head, True, BLOCK_Q, H, HEAD)
    scale = scale * LOG2E
    acc = tl.zeros((BLOCK_Q, HEAD), tl.float32)
    if HAS_SINKS:
        top = tl.zeros((BLOCK_Q,), tl.float32) + tl.load(sink_ptr + head).to(tl.float32) * LOG2E
        total = tl.full((BLOCK_Q,), 1.0, tl.float32)
    else:
        top = tl.full((BLOCK_Q,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
    kv_head = head // GROUP
    before = (full_low - low) // BLOCK_K
    inside = (full_high - full_low) // BLOCK_K
    after = tl.cdiv(tl.maximum(high - full_high, 0), BLOCK_K)
    acc, total, top = _forward_steps(
        acc, total, top, q_tile, k, v, batch, kv_head, rows, first, full_low, inside, full_low, inside, T_keys, offset, scale,
        k_batch, k_time, k_head, v_batch, v_time, v_head, False, H, HEAD, BLOCK_K, DESCRIPTORS,
    )  # fmt: skip
    acc, total, top = _forward_steps(
        acc, total, top, q_tile, k, v, batch, kv_head, rows, first, low, before, full_high, before + after, T_keys, offset,
        scale, k_batch, k_time, k_head, v_batch, v_time, v_head, True, H, HEAD, BLOCK_K, DESCRIPTORS,
    )  # fmt: skip
    seen = total > 0.0  # a query before the first key sees nothing: zero, and -inf
    out = acc * tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)[:, None]
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
    mask = rows < T
    tl.store(lse_ptr + (batch * N + head).to(tl.int64) * T + rows, lse, mask=mask)
    columns = tl.arange(0, HEAD)
    out_rows = out_ptr + (((batch.to(tl.int64) * T + rows) * N + head) * H)[:, None] + columns[None, :]
    tl.store(out_rows, out.to(out_ptr.dtype.element_ty), mask=mask[:, None] & (columns[None, :] < H))


@triton.jit
def _delta_steps(
    delta, total, q, d_out, lse, k, v, batch, head, rows, first, low, high, T_keys, offset,
    scale, k_batch, k_time, k_head, v_batch, v_time, v_head,
    H: tl.constexpr, HEAD: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """delta + rowsum(p * d_p), and total + rowsum(p)."""
    for step in range(tl.cdiv(tl.maximum(high - low, 0), BLOCK_K)):
        begin = low + step * BLOCK_K
        k_tile = _tile(k, batch, begin, head, T_keys, k_batch, k_time, k_head, True, BLOCK_K, H, HEAD)
        v_tile = _tile(v, batch, begin, head, T_keys, v_batch, v_time, v_head, True, BLOCK_K, H, HEAD)
        p = tl.exp2(tl.dot(q, tl.trans(k_tile), input_precision="ieee") * scale - lse[:, None])
        columns = begin + tl.arange(0, BLOCK_K)
        p = tl.where(_visible(rows[:, None], columns[None, :], first[:, None], T_keys, offset), p, 0.0)
        delta += tl.sum(p * tl.dot(d_out, tl.trans(v_tile), input_precision="ieee"), 1)
        total += tl.sum(p, 1)
    return delta, total


@triton.jit
def _dq_steps(
    dq, q, d_out, lse, delta, k, v, batch, head, rows, first, first_start, n_first, second_start, n_blocks, T_keys, offset,
    scale, k_batch, k_time, k_head, v_batch, v_time, v_head,
    MASKED: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    for step in range(n_blocks):
        begin = tl.where(step < n_first, first_start + step * BLOCK_K, second_start + (step - n_first) * BLOCK_K)
        k_tile = _block(k, batch, begin, head, T_keys, k_batch, k_time, k_head, MASKED, BLOCK_K, H, HEAD, DESCRIPTORS)
        v_tile = _block(v, batch, begin, head, T_keys, v_batch, v_time, v_head, MASKED, BLOCK_K, H, HEAD, DESCRIPTORS)
        p = tl.exp2(tl.dot(q, tl.trans(k_tile), input_precision="ieee") * scale - lse[:, None])
        if MASKED:
            columns = begin + tl.arange(0, BLOCK_K)
            p = tl.where(_visible(rows[:, None], columns[None, :], first[:, None], T_keys, offset), p, 0.0)
        dp = tl.dot(d_out, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit
def _dq_kernel(
    q, k, v, d_out, out, d_lse_ptr, lse_ptr, delta_ptr, sink_ptr, d_sink_ptr, dq_ptr, bounds_ptr,
    T, T_keys, N, offset, window, scale,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head, d_batch, d_time, d_head, o_batch, o_time, o_head,
    GROUP: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_D_LSE: tl.constexpr,
    HAS_DELTA: tl.constexpr, HAS_WINDOW: tl.constexpr, PACKED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """HAS_DELTA: delta is given, and neither out nor d_lse is read."""
    batch = tl.program_id(0) // N
    head = tl.program_id(0) % N
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    start = block * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    mask = rows < T
    first = _first_key(rows, bounds_ptr, T, offset, window, PACKED, HAS_WINDOW)
    low, full_low, full_high, high = _key_range(
        start, bounds_ptr, T, T_keys, offset, window, PACKED, HAS_WINDOW, BLOCK_Q, BLOCK_K
    )  # fmt: skip
    d_tile = _tile(d_out, batch, start, head, T, d_batch, d_time, d_head, True, BLOCK_Q, H, HEAD)
    q_tile = _tile(q, batch, start, head, T, q_batch, q_time, q_head, True, BLOCK_Q, H, HEAD)
    kv_head = head // GROUP
    scale2 = scale * LOG2E
    stats = (batch * N + head).to(tl.int64) * T + rows
    lse = tl.load(lse_ptr + stats, mask=mask, other=0.0)
    sink_share = tl.zeros((BLOCK_Q,), tl.float32)
    if HAS_SINKS:
        sink_share = tl.exp2((tl.load(sink_ptr + head).to(tl.float32) - lse) * LOG2E)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + stats, mask=mask, other=0.0)
    else:
        if q.dtype.element_ty == tl.float32:
            # The same sum as rowsum(d_out * out), but its rounding cancels against that of d_p and of lse below.
            delta, total = _delta_steps(
                tl.zeros((BLOCK_Q,), tl.float32), sink_share, q_tile, d_tile, lse * LOG2E, k, v, batch, kv_head, rows, first,
                low, high, T_keys, offset, scale2, k_batch, k_time, k_head, v_batch, v_time, v_head, H, HEAD, BLOCK_K,
            )  # fmt: skip
            delta /= tl.where(total > 0.0, total, 1.0)
        else:
            o_tile = _tile(out, batch, start, head, T, o_batch, o_time, o_head, True, BLOCK_Q, H, HEAD)
            delta = tl.sum(d_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
        if HAS_D_LSE:
            delta -= tl.load(d_lse_ptr + stats, mask=mask, other=0.0)
        tl.store(delta_ptr + stats, delta, mask=mask)
    if HAS_SINKS:
        row = (batch * tl.num_programs(1) + block).to(tl.int64)
        tl.store(d_sink_ptr + row * N + head, -tl.sum(tl.where(mask, sink_share * delta, 0.0), 0))
    lse = lse * LOG2E
    dq = tl.zeros((BLOCK_Q, HEAD), tl.float32)
    before = (full_low - low) // BLOCK_K
    inside = (full_high - full_low) // BLOCK_K
    after = tl.cdiv(tl.maximum(high - full_high, 0), BLOCK_K)
    dq = _dq_steps(
        dq, q_tile, d_tile, lse, delta, k, v, batch, kv_head, rows, first, full_low, inside, full_low, inside, T_keys, offset,
        scale2, k_batch, k_time, k_head, v_batch, v_time, v_head, False, H, HEAD, BLOCK_K, DESCRIPTORS,
    )  # fmt: skip
    dq = _dq_steps(
        dq, q_tile, d_tile, lse, delta, k, v, batch, kv_head, rows, first, low, before, full_high, before + after, T_keys,
        offset, scale2, k_batch, k_time, k_head, v_batch, v_time, v_head, True, H, HEAD, BLOCK_K, DESCRIPTORS,
    )  # fmt: skip
    columns = tl.arange(0, HEAD)
    dq_rows = dq_ptr + (((batch.to(tl.int64) * T + rows) * N + head) * H)[:, None] + columns[None, :]
    tl.store(dq_rows, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask[:, None] & (columns[None, :] < H))


@triton.jit
def _query_range(
    start, bounds_ptr, T, T_keys, offset, window,
    PACKED: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(low, full_low, full_high, high): the queries that see a block of keys, and between full_low and full_high, in whole
    blocks of queries, those that see all of it."""
    last = tl.minimum(start + BLOCK_K, T_keys) - 1
    first = tl.maximum(start - offset, 0)
    low = first // BLOCK_Q * BLOCK_Q
    full_low = tl.cdiv(tl.maximum(start + BLOCK_K - 1 - offset, 0), BLOCK_Q) * BLOCK_Q
    high = T
    full_high = T
    if PACKED:
        high = tl.load(bounds_ptr + last)
        full_high = tl.load(bounds_ptr + start)
    elif HAS_WINDOW:
        high = tl.minimum(tl.maximum(last - offset + window, 0), T)
        full_high = tl.minimum(tl.maximum(start - offset + window, 0), T)
    high = tl.where(first < high, high, low)  # all of these queries may be too early, and then none is read
    full_high = full_high // BLOCK_Q * BLOCK_Q
    full_low = tl.minimum(full_low, tl.maximum(tl.cdiv(high, BLOCK_Q) * BLOCK_Q, low))
    return low, full_low, tl.maximum(full_high, full_low), high


@triton.jit
def _dkv_steps(
    dk, dv, k, v, q, d_out, lse_ptr, delta_ptr, bounds_ptr, batch, kv_head, columns, first_start, n_first,
    second_start, n_blocks, T, T_keys, N, offset, window, scale, q_batch, q_time, q_head, d_batch, d_time, d_head,
    MASKED: tl.constexpr, PACKED: tl.constexpr, HAS_WINDOW: tl.constexpr, GROUP: tl.constexpr,
    H: tl.constexpr, HEAD: tl.constexpr, BLOCK_Q: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """For every query head of the group: n_first blocks of queries from first_start on, the rest from second_start on. One
    loop for all of it: loads run ahead from one head into the next."""
    for step in range(GROUP * n_blocks):
        head = kv_head * GROUP + step // n_blocks
        block = step % n_blocks
        begin = tl.where(block < n_first, first_start + block * BLOCK_Q, second_start + (block - n_first) * BLOCK_Q)
        rows = begin + tl.arange(0, BLOCK_Q)
        stats = (batch * N + head).to(tl.int64) * T
        q_tile = _block(q, batch, begin, head, T, q_batch, q_time, q_head, MASKED, BLOCK_Q, H, HEAD, DESCRIPTORS)
        lse = tl.load(lse_ptr + stats + rows, mask=rows < T, other=0.0) * LOG2E
        p = tl.exp2(tl.dot(k, tl.trans(q_tile), input_precision="ieee") * scale - lse[None, :])
        if MASKED:
            first = _first_key(rows, bounds_ptr, T, offset, window, PACKED, HAS_WINDOW)
            visible = _visible(rows[None, :], columns[:, None], first[None, :], T_keys, offset) & (rows < T)[None, :]
            p = tl.where(visible, p, 0.0)
        d_tile = _block(d_out, batch, begin, head, T, d_batch, d_time, d_head, MASKED, BLOCK_Q, H, HEAD, DESCRIPTORS)
        dv = tl.dot(p.to(d_tile.dtype), d_tile, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + stats + rows, mask=rows < T, other=0.0)
        dp = tl.dot(v, tl.trans(d_tile), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _dkv_kernel(
    q, k, v, d_out, lse_ptr, delta_ptr, dk_ptr, dv_ptr, first_ptr, beyond_ptr,
    T, T_keys, N, K, offset, window, scale,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head, d_batch, d_time, d_head,
    GROUP: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, HAS_WINDOW: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0) // K
    kv_head = tl.program_id(0) % K
    start = tl.program_id(1) * BLOCK_K  # the first keys are seen by most queries: the longest programs start first
    columns = start + tl.arange(0, BLOCK_K)
    low, full_low, full_high, high = _query_range(
        start, beyond_ptr, T, T_keys, offset, window, PACKED, HAS_WINDOW, BLOCK_Q, BLOCK_K
    )  # fmt: skip
    k_tile = _tile(k, batch, start, kv_head, T_keys, k_batch, k_time, k_head, True, BLOCK_K, H, HEAD)
    v_tile = _tile(v, batch, start, kv_head, T_keys, v_batch, v_time, v_head, True, BLOCK_K, H, HEAD)
    dk = tl.zeros((BLOCK_K, HEAD), tl.float32)
    dv = tl.zeros((BLOCK_K, HEAD), tl.float32)
    scale2 = scale * LOG2E
    before = (full_low - low) // BLOCK_Q
    inside = (full_high - full_low) // BLOCK_Q
    after = tl.cdiv(tl.maximum(high - full_high, 0), BLOCK_Q)
    dk, dv = _dkv_steps(
        dk, dv, k_tile, v_tile, q, d_out, lse_ptr, delta_ptr, first_ptr, batch, kv_head, columns, low, before, full_high,
        before + after, T, T_keys, N, offset, window, scale2, q_batch, q_time, q_head, d_batch, d_time, d_head,
        True, PACKED, HAS_WINDOW, GROUP, H, HEAD, BLOCK_Q, DESCRIPTORS,
    )  # fmt: skip
    dk, dv = _dkv_steps(
        dk, dv, k_tile, v_tile, q, d_out, lse_ptr, delta_ptr, first_ptr, batch, kv_head, columns, full_low, inside, full_low,
        inside, T, T_keys, N, offset, window, scale2, q_batch, q_time, q_head, d_batch, d_time, d_head,
        False, PACKED, HAS_WINDOW, GROUP, H, HEAD, BLOCK_Q, DESCRIPTORS,
    )  # fmt: skip
    head_columns = tl.arange(0, HEAD)
    rows = (((batch.to(tl.int64) * T_keys + columns) * K + kv_head) * H)[:, None] + head_columns[None, :]
    mask = (columns < T_keys)[:, None] & (head_columns < H)[None, :]
    tl.store(dk_ptr + rows, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + rows, dv.to(dv_ptr.dtype.element_ty), mask=mask)
