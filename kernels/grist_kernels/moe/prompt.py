"""The experts for the tokens of a prompt on a CPU, without gradients: two grouped products over rows sorted by expert.

T tokens, D model width, E experts, A active experts per token, F expert width, R = T * A rows sorted by expert.

Where nothing is kept for a backward, one call for all experts beats a loop over them (cpu.py), with its calls for each. 32
experts, 4 active, D 512, F 256, one core of an AMD EPYC: 8 % less time for 256 tokens, 20 % for 64 and for 1024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grist_kernels.moe.ids import check_ids
from grist_kernels.swiglu import swiglu


def fits(x: Tensor, w_gate_up: Tensor, w_down: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None) -> bool:
    """Eager float32 on a CPU without gradients or biases; rows of whole 16 bytes, which F.grouped_mm asks for."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and b_gate_up is None
        and b_down is None
        and w_gate_up.is_contiguous()
        and w_down.is_contiguous()
        and w_down.shape[1] % 4 == w_down.shape[2] % 4 == 0
    )


def moe(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    alpha: float | None,
    limit: float | None,
    interleaved: bool,
) -> Tensor:
    """As grist_kernels.moe, without biases."""
    experts, flat_R = w_down.shape[0], expert_ids.reshape(-1)
    check_ids(flat_R, experts)
    pair_R = flat_R.argsort(stable=True)
    place_R = torch.empty_like(pair_R)
    place_R[pair_R] = torch.arange(pair_R.shape[0])
    offsets_E = torch.bincount(flat_R, minlength=experts).cumsum(0, dtype=torch.int32)
    h_R2F = F.grouped_mm(x[pair_R // expert_ids.shape[1]], w_gate_up.detach(), offs=offsets_E)
    act_RF = swiglu(h_R2F, alpha=alpha, limit=limit, interleaved=interleaved)
    y_RD = F.grouped_mm(act_RF, w_down.detach(), offs=offsets_E)
    weights_TA = expert_weights.to(x.dtype).contiguous()
    return F.embedding_bag(place_R.view(expert_ids.shape), y_RD, per_sample_weights=weights_TA, mode="sum")
