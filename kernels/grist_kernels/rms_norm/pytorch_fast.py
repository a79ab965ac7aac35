"""RMSNorm on a CPU in eager mode, forward and backward in blocks of rows that stay in the cache. D model width.

The reference's autograd makes about ten whole-tensor temporaries; here each block's temporaries are reused while they are in
the cache. Measured speeds: kernels/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 524288  # 2 MiB of float32; 1 MiB is as fast, 256 KiB and whole tensors are slower
SMALL = 16384  # below this, as in generation, the calls cost more than the arithmetic: the reference makes fewer


def fits(x: Tensor, weight: Tensor) -> bool:
    """Eager, one type throughout, float32 or float64, on a CPU, not tiny. A compiler fuses the reference by itself."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and weight.dtype == x.dtype
        and x.numel() > SMALL
        and not torch.compiler.is_compiling()
    )


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, *, offset: float
) -> Tensor | tuple[Tensor, Tensor]:
    """As grist_kernels.rms_norm."""
    if offset:
        weight = weight + offset
    if residual is None:
        return _RmsNorm.apply(x, weight, eps)
    h = x + residual
    return _RmsNorm.apply(h, weight, eps), h


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_RD = x.reshape(-1, x.shape[-1])
        y_RD = x_RD.new_empty(x_RD.shape)
        rstd_R1 = x_RD.new_empty(x_RD.shape[0], 1)
        for block in _blocks(x_RD):
            rows, y, rstd = x_RD[block], y_RD[block], rstd_R1[block]
            torch.mul(rows, rows, out=y)
            torch.mean(y, -1, keepdim=True, out=rstd)
            rstd.add_(eps).rsqrt_()
            torch.mul(rows, rstd, out=y).mul_(weight)
        ctx.save_for_backward(x, weight, rstd_R1)
        return y_RD.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, rstd_R1 = ctx.saved_tensors
        x_RD, dy_RD = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])
        dx_RD, dw_D = x_RD.new_empty(x_RD.shape), torch.zeros_like(weight)
        scratch = x_RD.new_empty(min(_block_rows(x_RD), x_RD.shape[0]), x_RD.shape[1])
        for block in _blocks(x_RD):
            rows, grad, rstd, dx = x_RD[block], dy_RD[block], rstd_R1[block], dx_RD[block]
            # dx = rstd * (g - xhat * mean(g * xhat)) with g = dy * weight and xhat = x * rstd
            product = torch.mul(rows, grad, out=scratch[: rows.shape[0]]).mul_(rstd)
            dw_D += product.sum(0)  # not a matrix-vector product: sum() adds pairwise and keeps three more bits
            slope = torch.mv(product, weight).unsqueeze(1).mul_(rstd).mul_(-1 / x_RD.shape[1])
            torch.mul(grad, weight, out=dx)
            dx.addcmul_(rows, slope).mul_(rstd)
        return dx_RD.view(x.shape), dw_D, None


def _block_rows(x_RD: Tensor) -> int:
    return max(1, BLOCK_ELEMENTS // max(1, x_RD.shape[1]))


def _blocks(x_RD: Tensor) -> list[slice]:
    step = _block_rows(x_RD)
    return [slice(start, min(start + step, x_RD.shape[0])) for start in range(0, x_RD.shape[0], step)]
