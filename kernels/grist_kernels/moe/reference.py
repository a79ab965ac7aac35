"""Mixture of experts after routing: the definition. T tokens, D model width, E experts, A active experts per token, F width."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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


def moe_in_blocks(
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
    """The same for large sizes: every expert on its own tokens only, and again in the backward, so that little is kept."""

    def expert(x_RD: Tensor, weight_R: Tensor, *parameters: Tensor) -> Tensor:
        # One expert of the definition above; the parameters are those that are there, in the order of the signature.
        names = ("w_gate_up", "w_down", *(["b_gate_up"] if b_gate_up is not None else []))
        given = dict(zip([*names, "b_down"], [parameter[None] for parameter in parameters], strict=False))
        ids_R1 = torch.zeros(x_RD.shape[0], 1, dtype=torch.int64, device=x_RD.device)
        return moe(x_RD, ids_R1, weight_R[:, None], **given, alpha=alpha, limit=limit, interleaved=interleaved)

    # Unbound, not indexed: the gradient of an index is a tensor of zeros as large as all experts.
    experts = list(zip(*(w.unbind(0) for w in (w_gate_up, w_down, b_gate_up, b_down) if w is not None), strict=True))
    out = upcast(x).new_zeros(x.shape)
    for e in expert_ids.unique().tolist():
        token_R, slot_R = (expert_ids == e).nonzero(as_tuple=True)
        y_RD = checkpoint(expert, x[token_R], expert_weights[token_R, slot_R], *experts[e], use_reentrant=False)
        out = out.index_add(0, token_R, upcast(y_RD))
    return out.to(x.dtype)
