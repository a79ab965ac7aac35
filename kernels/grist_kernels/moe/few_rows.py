"""The experts for a few tokens on a CPU, without gradients: what a step of generation runs.

T tokens, D model width, E experts, A active experts per token, F expert width, P = T * A pairs of a token and an expert.

A vector times a matrix that is stored as (in, out) is a weighted sum of the matrix's rows, which is what embedding_bag does:
one call for all pairs, shared between the threads, instead of a product for every expert. Every pair reads its expert's
weights again, so it pays only while most pairs have an expert of their own. 4 of 32 experts, D 512, F 256, one token, 2 cores
of an AMD EPYC: 19 GB/s of weights, 7 as one product per expert (cpu.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grist_kernels.moe.ids import check_ids
from grist_kernels.swiglu.reference import split

MOST_PAIRS = 64


def fits(x: Tensor, expert_ids: Tensor, w_gate_up: Tensor, w_down: Tensor) -> bool:
    """Eager float32 on a CPU without gradients; at most two pairs for each expert that there is."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and 0 < expert_ids.numel() <= min(MOST_PAIRS, 2 * w_down.shape[0])
        and not torch.is_grad_enabled()
        and w_gate_up.is_contiguous()
        and w_down.is_contiguous()
        and not torch.compiler.is_compiling()
    )


def moe(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    *,
    alpha: float | None,
    limit: float | None,
    interleaved: bool,
) -> Tensor:
    """As grist_kernels.moe."""
    T, A = expert_ids.shape
    check_ids(expert_ids, w_down.shape[0])
    expert_P, weight_P1 = expert_ids.reshape(-1).long(), expert_weights.reshape(-1, 1).to(x.dtype)
    x_PD = x.unsqueeze(1).expand(T, A, -1).reshape(T * A, -1)
    h_P2F = _products(x_PD, w_gate_up, expert_P)
    if b_gate_up is not None:
        h_P2F += b_gate_up[expert_P]
    act_PF = _activation(h_P2F, alpha, limit, interleaved).mul_(weight_P1)
    out_TD = _products(act_PF, w_down, expert_P).view(T, A, -1).sum(1)
    if b_down is not None:
        out_TD += torch.bmm(weight_P1.view(T, 1, A), b_down[expert_P].view(T, A, -1)).squeeze(1)
    return out_TD


def _products(rows: Tensor, weight: Tensor, expert_P: Tensor) -> Tensor:
    """rows (P, in) @ weight (E, in, out)[expert_P] -> (P, out)."""
    width = weight.shape[1]
    index = expert_P.unsqueeze(1) * width + torch.arange(width)
    return F.embedding_bag(index, weight.detach().flatten(0, 1), mode="sum", per_sample_weights=rows.contiguous())


def _activation(gate_up: Tensor, alpha: float | None, limit: float | None, interleaved: bool) -> Tensor:
    """`swiglu` with silu, which is g * sigmoid(g) in one pass: g * sigmoid(a g) = silu(a g) / a."""
    gate, up = split(gate_up, interleaved)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if alpha is None:
        return F.silu(gate).mul_(up)
    return F.silu(gate * alpha).mul_(up + 1).mul_(1 / alpha)
