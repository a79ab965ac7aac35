"""Gated linear unit with a SiLU gate (Shazeer, 2020), and the clamped form of GPT-OSS. F expert width."""

from __future__ import annotations

from torch import Tensor

from grist_kernels.precision import upcast


def swiglu(
    gate_up: Tensor, *, alpha: float | None = None, limit: float | None = None, interleaved: bool = False
) -> Tensor:
    """gate_up (..., 2F) -> (..., F): gate * sigmoid(gate) * up, or gate * sigmoid(alpha * gate) * (up + 1)."""
    gate, up = split(upcast(gate_up), interleaved)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if alpha is None:
        out = gate * gate.sigmoid() * up
    else:
        out = gate * (alpha * gate).sigmoid() * (up + 1)
    return out.to(gate_up.dtype)


def split(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The gate and up parts of (..., 2F) as views: even and odd columns, or first and second half."""
    if interleaved:
        return gate_up[..., 0::2], gate_up[..., 1::2]
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up
