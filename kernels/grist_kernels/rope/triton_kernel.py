"""Rotary embedding in Triton: queries and keys in one launch. B batch, T time, N and K heads, H head width, P rotated pairs.

A program takes a few tokens and a few heads: it loads their cos and sin once, reads both halves of each head where they lie
(any strides but the last), and writes new contiguous tensors. The backward of a rotation is the rotation by the opposite
angle: the same kernel with another sign, and nothing but cos and sin is kept for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grist_kernels import launch
from grist_kernels.budget import Budget
from grist_kernels.launch import Config, Target, cdiv, next_power_of_2
from grist_kernels.two_faces import differentiable, faces

SIZES = (16, 32, 64, 128)  # pairs, rounded up to a power of two


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, batch, time, tokens, token_mask, first_head, n_heads, x_batch, x_time, x_head, cos, sin,
    H: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotate a tile of x; cos and sin are (TOKENS, 1, PAIRS). Columns from 2 P on pass unchanged."""
    heads = first_head + tl.arange(0, HEADS)[None, :, None]
    # A head's stride is T * H in the layout (B, N, T, H), so this product needs 64 bits too.
    x_rows = x_ptr + batch * x_batch + time * x_time + heads.to(tl.int64) * x_head
    out_rows = out_ptr + (tokens * n_heads + heads) * H
    row_mask = token_mask & (heads < n_heads)
    pairs = tl.arange(0, PAIRS)[None, None, :]
    mask = row_mask & (pairs < P)
    x1 = tl.load(x_rows + pairs, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_rows + P + pairs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_rows + pairs, (x1 * cos - x2 * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_rows + P + pairs, (x2 * cos + x1 * sin).to(out_ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        columns = 2 * P + tl.arange(0, REST)[None, None, :]
        rest_mask = row_mask & (columns < H)
        tl.store(out_rows + columns, tl.load(x_rows + columns, mask=rest_mask, other=0.0), mask=rest_mask)


@triton.jit
def _rotate_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, position_ptr,
    n_tokens, T, n_q_heads, n_k_heads, q_blocks, n_positions,
    q_batch, q_time, q_head, k_batch, k_time, k_head, cos_batch, cos_time, sin_batch, sin_time, position_batch, position_time,
    H: tl.constexpr, P: tl.constexpr, INVERSE: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    tokens = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    token_mask = tokens < n_tokens
    batch = tokens // T
    time = tokens % T
    pairs = tl.arange(0, PAIRS)[None, None, :]
    table_mask = token_mask & (pairs < P)
    if HAS_POSITIONS:
        rows = tl.load(position_ptr + batch * position_batch + time * position_time, mask=token_mask, other=0).to(
            tl.int64
        )
        # A position without a row gives NaN, which is seen, and not whatever lies behind the table.
        table_mask = table_mask & (rows >= 0) & (rows < n_positions)
        cos = tl.load(cos_ptr + rows * cos_time + pairs, mask=table_mask, other=float("nan"))
        sin = tl.load(sin_ptr + rows * sin_time + pairs, mask=table_mask, other=float("nan"))
    else:
        cos = tl.load(cos_ptr + batch * cos_batch + time * cos_time + pairs, mask=table_mask, other=0.0)
        sin = tl.load(sin_ptr + batch * sin_batch + time * sin_time + pairs, mask=table_mask, other=0.0)
    if INVERSE:
        sin = -sin
    if block < q_blocks:
        _rotate_heads(
            q_ptr, q_out_ptr, batch, time, tokens, token_mask, block * HEADS, n_q_heads, q_batch, q_time, q_head, cos, sin,
            H, P, HEADS, PAIRS, REST,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr, k_out_ptr, batch, time, tokens, token_mask, (block - q_blocks) * HEADS, n_k_heads, k_batch, k_time, k_head,
            cos, sin, H, P, HEADS, PAIRS, REST,
        )  # fmt: skip


def rotate_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    """About 2,048 pairs a program of 128 threads: a thread has four loads of 16 bytes in flight (bfloat16)."""
    heads = 8
    return {"TOKENS": max(1, 2048 // (heads * size)), "HEADS": heads, "num_warps": 128 // target.lanes}


def rotate_candidates(target: Target, dtype: torch.dtype, size: int) -> list[Config]:
    """For the tuner: 4 to 32 pairs a thread, over more tokens or more heads."""
    return [
        {"TOKENS": pairs * threads // (heads * size), "HEADS": heads, "num_warps": threads // target.lanes}
        for threads in (64, 128, 256)
        for heads in (1, 2, 4, 8, 16, 32)
        for pairs in (4, 8, 16, 32)
        if pairs * threads >= heads * size
    ]


FORMULAS = {"rotate": rotate_formula}
CANDIDATES = {"rotate": rotate_candidates}
BUDGETS = {"rotate": Budget(registers=96)}


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    (q, q_strides), (k, k_strides) = _strided(q), _strided(k)
    cos, sin = _unit_stride(cos), _unit_stride(sin)
    T, H, P = q.shape[-3], q.shape[-1], cos.shape[-1]
    N, K, n_tokens = q.shape[-2], k.shape[-2], q.shape[:-2].numel()
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    pairs = next_power_of_2(P)
    config = dict(launch.config("rope", "rotate", launch.target(q.device), q.dtype, pairs, rotate_formula))
    config["HEADS"] = min(config["HEADS"], next_power_of_2(max(N, K, 1)))
    q_blocks = cdiv(N, config["HEADS"])
    launch.run(
        _rotate_kernel, (cdiv(n_tokens, config["TOKENS"]), q_blocks + cdiv(K, config["HEADS"])), q.device,
        q, k, q_out, k_out, cos, sin, cos if positions is None else positions,
        n_tokens, T, N, K, q_blocks, cos.shape[-2],
        *q_strides, *k_strides, *_table_strides(cos), *_table_strides(sin),
        *((0, 0) if positions is None else _position_strides(positions)),
        H=H, P=P, INVERSE=inverse, HAS_POSITIONS=positions is not None, PAIRS=pairs,
        REST=next_power_of_2(H - 2 * P) if H > 2 * P else 0, **config,
    )  # fmt: skip
    return q_out, k_out


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strided(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x with its batch, time and head strides; a copy if the last axis has gaps."""
    x = _unit_stride(x)
    return x, (x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2))


def _table_strides(table: Tensor) -> tuple[int, int]:
    return table.stride(0) if table.dim() == 3 else 0, table.stride(-2)


def _position_strides(positions: Tensor) -> tuple[int, int]:
    return positions.stride(0) if positions.dim() == 2 else 0, positions.stride(-1)


_ROTATE = faces(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool inverse) -> (Tensor, Tensor)",
    _rotate,
    lambda q, k, cos, sin, positions, inverse: (q.new_empty(q.shape), k.new_empty(k.shape)),
)


def _save(ctx, inputs, output) -> None:
    _, _, cos, sin, positions, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _gradients(ctx, run, dq: Tensor | None, dk: Tensor | None):
    cos, sin, positions = ctx.saved_tensors
    given = dq if dk is None else dk
    if given is None:
        return (None,) * 6
    # Where one is not wanted, no head of it is rotated.
    nothing = given[..., :0, :]
    d_inputs = run(nothing if dq is None else dq, nothing if dk is None else dk, cos, sin, positions, not ctx.inverse)
    return None if dq is None else d_inputs[0], None if dk is None else d_inputs[1], None, None, None, None


_rotated = differentiable(_ROTATE, _ROTATE, _save, _gradients)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """As grist_kernels.rope."""
    return _rotated(q, k, cos, sin, positions, False)
