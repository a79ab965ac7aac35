"""Rotary embedding on a CPU in eager mode. B batch, T time, N (or any) heads, H head width.

The formula as written runs inner loops of H/2 = 32 elements, because cos and sin are broadcast between the heads, and makes
seven temporaries. Here x * [cos, cos] + swap_halves(x) * [-sin, sin] runs over whole rows of N * H elements, block by block in
the cache, straight into the result. The backward of a rotation is the rotation by the opposite angle, so nothing but cos and
sin is kept. Measured speeds: kernels/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 131072  # 512 KiB of float32: half a second-level cache; the swapped copy takes the other half
SMALL = 16384  # below this, as in generation, the calls cost more than the arithmetic: the reference makes fewer


def fits(q: Tensor, cos: Tensor) -> bool:
    """Eager, one type throughout, float32 or float64, on a CPU. A compiler fuses the reference by itself."""
    return (
        q.device.type == "cpu"
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
    B, T, N, H = x_BTNH.shape
    cos_rows = torch.cat((cos, cos), -1).unsqueeze(-2).expand(*cos.shape[:-1], N, H).contiguous()
    sin_rows = torch.cat((-sin, sin), -1).unsqueeze(-2).expand(*cos.shape[:-1], N, H).contiguous()
    step = max(1, BLOCK_ELEMENTS // max(1, N * H))
    scratch = x.new_empty(min(step, T), N, H)
    for b in range(B):
        cos_TNH, sin_TNH = (cos_rows[b], sin_rows[b]) if cos.dim() == 3 else (cos_rows, sin_rows)
        for start in range(0, T, step):
            block = slice(start, min(start + step, T))
            rows = x_BTNH[b, block]
            swapped = scratch[: rows.shape[0]]
            swapped[..., : H // 2] = rows[..., H // 2 :]
            swapped[..., H // 2 :] = rows[..., : H // 2]
            torch.mul(rows, cos_TNH[block], out=out_BTNH[b, block]).addcmul_(swapped, sin_TNH[block])
    return out
