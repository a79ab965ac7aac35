"""Mixture of experts after routing: the definition. T tokens, D model width, E experts, A active experts per token, F width."""

from __future__ import annotations

from torch import Tensor

from grist_kernels.precision import upcast
from grist_kernels.swiglu.reference import swiglu


def moe(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    """out[t] = sum over a of expert_weights[t, a] * expert(expert_ids[t, a])(x[t]).

    Written without sorting: every expert reads every token, and weighs zero where it was not chosen. That costs E / A times
    the arithmetic and needs nothing but matrix products.
    """
    wide = upcast(x)
    weight_TE = wide.new_zeros(x.shape[0], w_down.shape[0])
    weight_TE = weight_TE.scatter_add(1, expert_ids.long(), expert_weights.to(wide.dtype))
    out = wide.new_zeros(x.shape)
    for e in range(w_down.shape[0]):
        h_T2F = wide @ upcast(w_gate_up[e])
        if b_gate_up is not None:
            h_T2F = h_T2F + upcast(b_gate_up[e])
        y_TD = swiglu(h_T2F, alpha=alpha, limit=limit, interleaved=interleaved) @ upcast(w_down[e])
        if b_down is not None:
            y_TD = y_TD + upcast(b_down[e])
        out = out + weight_TE[:, e, None] * y_TD
    return out.to(x.dtype)
