"""The experts in plain PyTorch: rows sorted by expert, one matrix product per expert and layer.

T tokens, D model width, E experts, A active experts per token, F expert width, R = T * A rows sorted by expert.

All routes are exact. On a CPU in eager mode: for the few rows of a step of generation the native kernel, or without it two
calls for all experts (few_rows.py); for a prompt two grouped products (prompt.py); with gradients one autograd function over
segments of rows (cpu.py). Everywhere else a composition of `grouped_matmul` and `swiglu`, which torch.compile traces whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels.grouped_matmul.pytorch_fast import grouped_matmul
from grist_kernels.moe import cpu, few_rows, prompt
from grist_kernels.native import moe as native
from grist_kernels.swiglu.reference import swiglu


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
    if native.fits(x, expert_ids, w_gate_up, w_down):
        return native.moe(
            x, expert_ids, expert_weights, w_gate_up, w_down, b_gate_up, b_down,
            alpha=alpha, limit=limit, interleaved=interleaved,
        )  # fmt: skip
    if few_rows.fits(x, expert_ids, w_gate_up, w_down):
        return few_rows.moe(
            x, expert_ids, expert_weights, w_gate_up, w_down, b_gate_up, b_down,
            alpha=alpha, limit=limit, interleaved=interleaved,
        )  # fmt: skip
    if prompt.fits(x, w_gate_up, w_down, b_gate_up, b_down):
        options = {"alpha": alpha, "limit": limit, "interleaved": interleaved}
        return prompt.moe(x, expert_ids, expert_weights, w_gate_up, w_down, **options)
    if cpu.fits(x):
        return cpu.moe(x, expert_ids, expert_weights, w_gate_up, w_down, b_gate_up, b_down, alpha, limit, interleaved)
    order_R, token_R, place_TA, offsets_E = sort_by_expert(expert_ids, w_down.shape[0])
    x_RD = _gather_rows(x, token_R, place_TA)
    h = grouped_matmul(x_RD, w_gate_up, offsets_E, b_gate_up)
    act = swiglu(h, alpha=alpha, limit=limit, interleaved=interleaved)
    y_RD = grouped_matmul(act, w_down, offsets_E, b_down)
    y_TAD = _gather_rows(y_RD, place_TA.view(-1), order_R[:, None]).view(*place_TA.shape, y_RD.shape[1])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (y_TAD.to(wide) * expert_weights.to(wide).unsqueeze(-1)).sum(1).to(x.dtype)


def sort_by_expert(expert_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How to go from tokens to rows sorted by expert, and back.

    Returns order (R,): the flat (token, slot) pair of each row; token (R,): the token of each row; place (T, A): the row of
    each pair; offsets (E,) int32: where each expert's rows end. Rows of one expert keep the order of their tokens.
    """
    flat_R = expert_ids.reshape(-1)
    order_R = flat_R.argsort(stable=True)
    place_TA = order_R.argsort().view(expert_ids.shape)
    offsets_E = torch.searchsorted(
        flat_R[order_R], torch.arange(experts, device=flat_R.device), right=True, out_int32=True
    )
    return order_R, order_R // expert_ids.shape[1], place_TA, offsets_E


def _gather_rows(x: Tensor, index: Tensor, places: Tensor) -> Tensor:
    """x[index] for two-dimensional x; places (rows of x, n): where in the result each row of x appears."""
    return _GatherRows.apply(x, index, places)


class _GatherRows(torch.autograd.Function):
    """The gradient is a gather and a sum too, instead of index_add_: no atomics, so the same bits on every run of a GPU."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x[index]

    @staticmethod
    def backward(ctx, d_rows: Tensor):
        (places,) = ctx.saved_tensors
        return d_rows[places].sum(1), None, None
