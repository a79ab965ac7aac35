"""Causal attention on a CPU in eager mode: PyTorch's flash kernel, called in blocks of queries, with sinks added exactly.

B batch, T time, N query heads, K key/value heads, H head width.

`F.scaled_dot_product_attention` knows neither windows nor sinks, so the kernel beneath it is called: it returns the logarithm
lse of the softmax denominator, reads grouped queries in place and takes an additive mask.
- Blocks: each block of queries gets only the keys that it can see. This saves the keys outside the window, and it is faster
  without a window too, because the kernel's own causal tiling is coarse, most of all in the backward.
- Sinks: with lse' = log(exp(lse) + exp(sink)), the output is out * exp(lse - lse'). The flash backward computes
  p = exp(s - lse') and ds = p * (dp - rowsum(d_out * out)); given lse' and the scaled output it is exact for dq, dk and dv,
  and d_sink = -sum exp(sink - lse') * rowsum(d_out * out).
Measured speeds: kernels/README.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def fits(q: Tensor) -> bool:
    """Eager float32 or float64 on a CPU, with something to compute."""
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.float64)
        and q.numel() > 0
        and not torch.compiler.is_compiling()
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
) -> Tensor:
    """As grist_kernels.attention, without lse."""
    if sinks is not None:
        sinks = sinks.to(q.dtype)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if cu_seqlens is None:
        return _Attention.apply(q, k, v, sinks, [0, q.shape[1]], window, scale)
    return _Attention.apply(q[None], k[None], v[None], sinks, cu_seqlens.tolist(), window, scale)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, ends: list[int], window: int | None, scale: float | None) -> Tensor:
        B, T, N, _ = q.shape
        out_BTNH, lse_BTN = q.new_empty(q.shape), q.new_empty(B, T, N)
        for queries, keys, mask in _blocks(ends, window, q):
            out, lse = _forward_kernel(
                _heads_first(q[:, queries]), _heads_first(k[:, keys]), _heads_first(v[:, keys]),
                0.0, False, attn_mask=mask, scale=scale,
            )  # fmt: skip
            out_BTNH[:, queries], lse_BTN[:, queries] = out.transpose(1, 2), lse.transpose(1, 2)
        if sinks is not None:
            out_BTNH.mul_(torch.sigmoid(lse_BTN - sinks).unsqueeze(-1))
            lse_BTN = torch.logaddexp(lse_BTN, sinks)
        ctx.save_for_backward(q, k, v, sinks, out_BTNH, lse_BTN)
        ctx.options = (ends, window, scale)
        return out_BTNH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: Tensor):
        q, k, v, sinks, out_BTNH, lse_BTN = ctx.saved_tensors
        ends, window, scale = ctx.options
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        for queries, keys, mask in _blocks(ends, window, q):
            dq_block, dk_block, dv_block = _backward_kernel(
                _heads_first(d_out[:, queries]), _heads_first(q[:, queries]),
                _heads_first(k[:, keys]), _heads_first(v[:, keys]),
                _heads_first(out_BTNH[:, queries]), _heads_first(lse_BTN[:, queries]),
                0.0, False, attn_mask=mask, scale=scale,
            )  # fmt: skip
            dq[:, queries] = dq_block.transpose(1, 2)
            dk[:, keys] += dk_block.transpose(1, 2)
            dv[:, keys] += dv_block.transpose(1, 2)
        d_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            d_sinks = -(torch.exp(sinks - lse_BTN) * (d_out * out_BTNH).sum(-1)).sum((0, 1))
        return dq, dk, dv, d_sinks, None, None, None


def _blocks(ends: list[int], window: int | None, like: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, the keys they can see, and the additive mask between them, for every block of every sequence."""
    longest = max(end - start for start, end in itertools.pairwise(ends))
    block = longest if longest <= 256 else 128  # 128 was the best of 64, 128, 256: kernels/README.md
    reach = longest if window is None else min(window, longest)  # how many keys the first query of a block sees at most
    mask = _mask(block, min(longest, reach + block - 1), window, like)
    for sequence_start, sequence_end in itertools.pairwise(ends):
        for start in range(sequence_start, sequence_end, block):
            end = min(start + block, sequence_end)
            first_key = max(sequence_start, start - reach + 1)
            yield (
                slice(start, end),
                slice(first_key, end),
                mask[block - (end - start) :, mask.shape[1] - (end - first_key) :],
            )


def _mask(rows: int, columns: int, window: int | None, like: Tensor) -> Tensor:
    """0 where visible, -inf elsewhere, when the last row's query and the last column's key are the same token."""
    distance = torch.arange(rows)[:, None] - rows - (torch.arange(columns) - columns)
    hidden = distance < 0
    if window is not None:
        hidden = hidden | (distance >= window)
    return like.new_zeros(rows, columns).masked_fill_(hidden, float("-inf"))


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)
