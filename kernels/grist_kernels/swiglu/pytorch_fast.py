"""SwiGLU on a CPU in eager mode, in blocks of rows that stay in the cache.

Two identities keep the passes over memory few: g * sigmoid(a g) = silu(a g) / a, and its derivative is silu'(a g), so that
PyTorch's fused silu and silu_backward serve the GPT-OSS form too. Blocks of rows let the temporaries live in the cache
and be reused, where whole-tensor temporaries cost page faults (a fresh 16 MB result takes ten times as long to write
as a warm one). Measured speeds: kernels/README.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grist_kernels.swiglu.reference import split

BLOCK_ELEMENTS = 524288  # 2 MiB of float32; 1 MiB is as fast, 256 KiB and whole tensors are slower
SMALL = 16384  # below this, as in generation, the calls cost more than the arithmetic: the reference makes fewer


def fits(gate_up: Tensor) -> bool:
    """Eager float32 or float64 on a CPU, not tiny. A compiler fuses the reference by itself; narrower types round once."""
    return (
        gate_up.device.type == "cpu"
        and gate_up.dtype in (torch.float32, torch.float64)
        and gate_up.numel() > SMALL
        and not torch.compiler.is_compiling()
    )


def swiglu(gate_up: Tensor, *, alpha: float | None, limit: float | None, interleaved: bool) -> Tensor:
    """As grist_kernels.swiglu."""
    return _Swiglu.apply(gate_up, alpha, limit, interleaved)


def rows_per_block(width: int) -> int:
    """How many rows of a matrix of this width make a block."""
    return max(1, BLOCK_ELEMENTS // max(1, width))


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor, alpha: float | None, limit: float | None, interleaved: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.options = (alpha, limit, interleaved)
        width = gate_up.shape[-1] // 2
        rows = gate_up.reshape(-1, 2 * width)
        out = rows.new_empty(rows.shape[0], width)
        step = rows_per_block(width)
        scratch = rows.new_empty(min(step, rows.shape[0]), width)
        for start in range(0, rows.shape[0], step):
            block = slice(start, min(start + step, rows.shape[0]))
            gate, up = split(rows[block], interleaved)
            forward_block(gate, up, alpha, limit, out=out[block], scratch=scratch[: gate.shape[0]])
        return out.view(*gate_up.shape[:-1], width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: Tensor):
        (gate_up,) = ctx.saved_tensors
        alpha, limit, interleaved = ctx.options
        width = gate_up.shape[-1] // 2
        rows, d_rows = gate_up.reshape(-1, 2 * width), d_out.reshape(-1, width)
        d_gate_up = rows.new_empty(rows.shape)
        step = rows_per_block(width)
        scratch = BackwardScratch(min(step, rows.shape[0]), width, rows)
        for start in range(0, rows.shape[0], step):
            block = slice(start, min(start + step, rows.shape[0]))
            gate, up = split(rows[block], interleaved)
            d_gate, d_up = split(d_gate_up[block], interleaved)
            backward_block(gate, up, d_rows[block], alpha, limit, d_gate, d_up, scratch)
        return d_gate_up.view(gate_up.shape), None, None, None


def forward_block(
    gate: Tensor, up: Tensor, alpha: float | None, limit: float | None, out: Tensor, scratch: Tensor
) -> None:
    """Write the activation of gate and up, (rows, F) each with any strides, into out (rows, F)."""
    _scaled_gate(gate, alpha, limit, out=scratch)
    torch.nn.functional.silu(scratch, inplace=True)
    _shifted_up_times(scratch, up, alpha, limit, out=out)


class BackwardScratch:
    """The reused buffers of backward_block; `act` holds the activation afterwards, for who needs it again."""

    def __init__(self, rows: int, width: int, like: Tensor):
        self.act, self.gate, self.silu, self.up = like.new_empty(4, rows, width).unbind(0)


def backward_block(
    gate: Tensor,
    up: Tensor,
    d_act: Tensor,
    alpha: float | None,
    limit: float | None,
    d_gate: Tensor,
    d_up: Tensor,
    scratch: BackwardScratch,
    want_act: bool = False,
) -> None:
    """Write the gradients of gate and up into d_gate and d_up; scratch.act gets the activation itself if wanted."""
    n = gate.shape[0]
    scaled, silu, shifted = scratch.gate[:n], scratch.silu[:n], scratch.up[:n]
    _scaled_gate(gate, alpha, limit, out=scaled)
    torch.ops.aten.silu.out(scaled, out=silu)
    if alpha is not None:
        silu.mul_(1 / alpha)
    shifted_up = up
    if limit is not None:
        shifted_up = torch.clamp(up, -limit, limit, out=shifted)
    if alpha is not None:
        shifted_up = torch.add(shifted_up, 1, out=shifted)
    if want_act:
        torch.mul(silu, shifted_up, out=scratch.act[:n])
    torch.mul(d_act, shifted_up, out=shifted)
    if limit is None:
        torch.mul(d_act, silu, out=d_up)
        torch.ops.aten.silu_backward.grad_input(shifted, scaled, grad_input=d_gate)
        return
    torch.mul(d_act, silu, out=silu)
    torch.ops.aten.silu_backward.grad_input(shifted, scaled, grad_input=scaled)
    edge = _just_above(limit, gate.dtype)
    torch.ops.aten.hardtanh_backward.grad_input(silu, up, -edge, edge, grad_input=d_up)
    torch.ops.aten.hardtanh_backward.grad_input(scaled, gate, -math.inf, edge, grad_input=d_gate)


def _scaled_gate(gate: Tensor, alpha: float | None, limit: float | None, out: Tensor) -> None:
    """alpha * min(gate, limit), with 1 for a missing alpha."""
    if limit is not None:
        gate = torch.clamp(gate, max=limit, out=out)
    if alpha is not None:
        torch.mul(gate, alpha, out=out)
    elif limit is None:
        out.copy_(gate)


def _shifted_up_times(silu: Tensor, up: Tensor, alpha: float | None, limit: float | None, out: Tensor) -> None:
    """silu * up, or silu / alpha * (up + 1)."""
    if limit is not None:
        up = torch.clamp(up, -limit, limit, out=out)
    if alpha is None:
        torch.mul(silu, up, out=out)
    else:
        torch.addcmul(silu, silu, up, out=out)
        out.mul_(1 / alpha)


def _just_above(limit: float, dtype: torch.dtype) -> float:
    """The next number above limit: hardtanh passes a gradient strictly inside its bounds, and clamp on them too."""
    if dtype == torch.float64:
        return math.nextafter(limit, math.inf)
    return torch.nextafter(torch.tensor(limit, dtype=dtype), torch.tensor(math.inf, dtype=dtype)).item()
