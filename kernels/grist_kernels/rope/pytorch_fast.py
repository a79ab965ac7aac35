"""Rotary embedding on a CPU in eager mode. B batch, T time, N (or any) heads, H head width.

The formula as written runs inner loops of H/2 = 32 elements, because cos and sin are broadcast between the heads, and makes
seven temporaries. Here x * [cos, cos] + swap_halves(x) * [-sin, sin] runs over whole rows of N * H elements, block by block in
the cache, straight into the result. The backward of a rotation is the rotation by the opposite angle, so nothing but cos and
sin is kept. Measured speeds: kernels/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 524288  # 2 MiB of float32
SMALL = 16384  # below this, as in generation, the calls cost more than the arithmetic: the reference makes fewer


def fits(q: Tensor, cos: Tensor, positions: Tensor | None) -> bool:
    """Eager, whole heads, one type throughout, float32 or float64, on a CPU. A compiler fuses the reference by itself."""
    return (
        positions is None
        and 2 * cos.shape[-1] == q.shape[-1]
        and q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.float64)
        and cos.dtype == q.dtype
        and q.numel() > SMALL
        and not torch.compiler.is_compiling()
    )


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As grist_kernels.rope."""
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    x_BTNH, out_BTNH = (x[None], out[None]) if x.dim() == 3 else (x, out)
    cos, sin = (cos, sin) if cos.dim() == 3 else (cos[None], sin[None])
    B, T, N, H = x_BTNH.shape
    cos_rows = torch.cat((cos, cos), -1).unsqueeze(-2).expand(-1, T, N, H).contiguous()
    sin_rows = torch.cat((-sin, sin), -1).unsqueeze(-2).expand(-1, T, N, H).contiguous()
    sequences, tokens = _block_shape(B, T, N * H)
    scratch = x.new_empty(sequences * tokens, N, H)
    for first in range(0, B, sequences):
        several = slice(first, min(first + sequences, B))
        own = several if cos_rows.shape[0] > 1 else slice(None)  # tables: one for each sequence, or one for all
        for start in range(0, T, tokens):
            block = slice(start, min(start + tokens, T))
            rows, target = x_BTNH[several, block], out_BTNH[several, block]
            swapped = scratch[: rows.shape[0] * rows.shape[1]].view(rows.shape)
            swapped[..., : H // 2] = rows[..., H // 2 :]
            swapped[..., H // 2 :] = rows[..., : H // 2]
            torch.mul(rows, cos_rows[own, block], out=target).addcmul_(swapped, sin_rows[own, block])
    return out


def _block_shape(B: int, T: int, row_elements: int) -> tuple[int, int]:
    """How many sequences, and how many of their tokens, make a block."""
    tokens = min(T, max(1, BLOCK_ELEMENTS // row_elements))
    return max(1, min(B, BLOCK_ELEMENTS // (tokens * row_elements))), tokens
