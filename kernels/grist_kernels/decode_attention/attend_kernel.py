"""Attention to a cache in Triton: the device's side. T new tokens, S cache slots, K key heads, G = N / K query heads of each.

A program takes one key head of one sequence, some rows (a row is one new token and one of the G query heads), and one split of
the slots that they see. It walks over its split in blocks with an online softmax. Slots outside the window or from the
length on are never read, not even a part of a block. Logits and their logarithms are to base 2.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (Device code is Python by its looks only: the compiler gives names, loops and calls other types than Python has.)

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _softmax_step(top, total, logits):
    """Take a block of logits (rows, BLOCK) into a running softmax: (top, total, what the sums so far shrink by, weights)."""
    higher = tl.maximum(top, tl.max(logits, 1))
    origin = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing: -inf - -inf is NaN
    weights = tl.exp2(logits - origin[:, None])
    shrink = tl.exp2(top - origin)
    return higher, total * shrink + tl.sum(weights, 1), shrink, weights


@triton.jit(do_not_specialize=["n_sequences", "T", "slots", "window", "n_pages"])
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, length_ptr, table_ptr, sink_ptr, out_ptr, lse_ptr,
    n_sequences, n_key_heads, T, slots, window, n_pages, scale,
    q_batch, q_time, q_head, k_batch, k_slot, k_head, k_width, v_batch, v_slot, v_head, v_width, table_batch,
    H: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, HAS_SINKS: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out (B, T, N, H), or if SPLIT its parts (B, T, N, splits, H) and their lse (B, T, N, splits), both float32.

    PAGE is the page size, 0 for a cache without pages; scale includes log2(e). A split that has no slot to see writes zeros,
    and an lse of -inf.
    """
    program = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    key_head = program % n_key_heads
    batch = (program // n_key_heads % n_sequences).to(tl.int64)
    first_row = program // (n_key_heads * n_sequences) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    row_mask = rows < T * GROUP
    tokens = (rows // GROUP).to(tl.int64)
    heads = (key_head * GROUP + rows % GROUP).to(tl.int64)
    columns = tl.arange(0, WIDTH)[None, :]
    column_mask = columns < H

    given_length = tl.load(length_ptr + batch)
    fits = (given_length >= 0) & (given_length <= slots)
    before = tl.where(fits, given_length, 0).to(tl.int32) - T  # where the first new token stands
    last_token = tl.minimum((first_row + ROWS - 1) // GROUP, T - 1)
    start = tl.maximum(before + first_row // GROUP - window + 1, 0)
    stop = tl.maximum(before + last_token + 1, 0)
    per_split = tl.cdiv(tl.cdiv(stop - start, splits), BLOCK) * BLOCK
    start += split * per_split
    stop = tl.minimum(start + per_split, stop)
    positions = (before + rows // GROUP)[:, None]

    q_rows = q_ptr + batch * q_batch + tokens * q_time + heads * q_head
    q = tl.load(q_rows[:, None] + columns, mask=row_mask[:, None] & column_mask, other=0.0)
    if HAS_SINKS:
        top = tl.load(sink_ptr + heads, mask=row_mask, other=0.0).to(tl.float32) * LOG2E
        total = tl.full((ROWS,), 1.0, tl.float32)
    else:
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    k_base = k_ptr + key_head.to(tl.int64) * k_head
    v_base = v_ptr + key_head.to(tl.int64) * v_head
    for block in range(start, stop, BLOCK):
        slot = block + tl.arange(0, BLOCK)
        inside = slot < stop
        if PAGE:
            entry = table_ptr + batch * table_batch + slot // PAGE
            place = tl.load(entry, mask=inside, other=0).to(tl.int64)
            readable = inside & (place >= 0) & (place < n_pages)
            line = (slot % PAGE).to(tl.int64)
        else:
            place = batch
            readable = inside
            line = slot.to(tl.int64)
        mask = readable[:, None] & column_mask
        k_rows = (k_base + place * k_batch + line * k_slot)[:, None]
        v_rows = (v_base + place * v_batch + line * v_slot)[:, None]
        k = tl.load(k_rows + columns.to(tl.int64) * k_width, mask=mask, other=0.0)
        v = tl.load(v_rows + columns.to(tl.int64) * v_width, mask=mask, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        distance = positions - slot[None, :]
        visible = (distance >= 0) & (distance < window)
        logits = tl.where(visible, logits, float("-inf"))
        if PAGE:  # a page that the cache does not have gives NaN, which is seen, and not whatever lies there
            logits = tl.where(visible & (readable == 0)[None, :], float("nan"), logits)
        top, total, shrink, weights = _softmax_step(top, total, logits)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out = tl.where(fits, out, float("nan"))  # a length that it does not have, too
    n_heads = n_key_heads * GROUP
    targets = ((batch * T + tokens) * n_heads + heads) * splits + split
    tl.store(
        out_ptr + targets[:, None] * H + columns, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask
    )
    if SPLIT:
        tl.store(lse_ptr + targets, top + tl.log2(total), mask=row_mask)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    part_ptr, lse_ptr, sink_ptr, out_ptr, splits, n_heads,
    H: tl.constexpr, HAS_SINKS: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out (rows, H) from its parts (rows, splits, H) and their lse (rows, splits); a row is a token and a query head."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)[None, :]
    if HAS_SINKS:
        top = tl.zeros((1,), tl.float32) + tl.load(sink_ptr + row % n_heads).to(tl.float32) * LOG2E
        total = tl.full((1,), 1.0, tl.float32)
    else:
        top = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, WIDTH), tl.float32)
    for first in range(0, splits, SPLITS):
        numbers = first + tl.arange(0, SPLITS)
        lse = tl.load(lse_ptr + row * splits + numbers, mask=numbers < splits, other=float("-inf"))
        top, total, shrink, weights = _softmax_step(top, total, lse[None, :])
        mask = (numbers < splits)[:, None] & (columns < H)
        parts = tl.load(part_ptr + (row * splits + numbers)[:, None] * H + columns, mask=mask, other=0.0)
        acc = acc * shrink[:, None] + tl.sum(tl.trans(weights) * parts, 0)[None, :]
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + row * H + columns, out.to(out_ptr.dtype.element_ty), mask=columns < H)
