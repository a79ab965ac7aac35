"""The training loss of one micro-batch. Shapes: B batch, T time, D width, V vocabulary, L layers, E experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from grist_data import Batch
from grist_kernels import linear_cross_entropy
from grist_model.config import ModelConfig
from grist_model.transformer import Transformer


@dataclass(frozen=True)
class MicroBatchResult:
    """What one micro-batch adds to the step: sums, so that they add up over micro-batches and ranks.

    Attributes:
        objective: Scalar to call `backward` on, already divided by the step's global counts.
        sums: (3,) float32: cross entropy in nats, balance loss, router z-loss.
        tokens_per_expert_LE: Assignments, or None in a dense model.
        entropy_sum_L: Router entropy in nats summed over tokens, or None.
    """

    objective: torch.Tensor
    sums: torch.Tensor
    tokens_per_expert_LE: torch.Tensor | None
    entropy_sum_L: torch.Tensor | None


def language_model_loss(
    model: Transformer, config: ModelConfig, batch: Batch, valid_tokens: int, all_tokens: int
) -> MicroBatchResult:
    """Cross entropy of the next token, plus the router's losses.

    Args:
        valid_tokens: Targets that count, over the whole step and all ranks; divides the cross entropy.
        all_tokens: Tokens routed over the whole step and all ranks; divides the router's losses.

    Dividing by global counts, not by those of a micro-batch, is what makes the gradient independent of how a step is cut into
    micro-batches and ranks.
    """
    if config.experts == 0:
        hidden_BTD, router = model.hidden(batch.ids_BT, cu_seqlens=batch.cu_seqlens), None
    else:
        hidden_BTD, router = model.hidden(batch.ids_BT, cu_seqlens=batch.cu_seqlens, return_router=True)
    cross_entropy = linear_cross_entropy(
        hidden_BTD.flatten(0, 1),
        model.unembedding,
        batch.targets_BT.flatten(),
        softcap=config.logit_softcap,
        reduction="sum",
    )
    objective = cross_entropy / valid_tokens
    if router is None:
        zero = torch.zeros_like(cross_entropy)
        return MicroBatchResult(objective, torch.stack([cross_entropy.detach(), zero, zero]).float(), None, None)

    per_token = all_tokens * config.layers
    if config.balance == "aux" and config.aux_loss_weight:
        objective = objective + router.aux_loss_sum * (config.aux_loss_weight / per_token)
    if config.router_z_loss_weight:
        objective = objective + router.z_loss_sum * (config.router_z_loss_weight / per_token)
    parts = [cross_entropy.detach(), router.aux_loss_sum.detach(), router.z_loss_sum.detach()]
    return MicroBatchResult(
        objective,
        torch.stack([part.float() for part in parts]),
        router.tokens_per_expert_LE.detach(),
        router.entropy_sum_L.detach(),
    )


def step_values(
    results: list[MicroBatchResult],
    grad_norm: torch.Tensor,
    valid_tokens: int,
    all_tokens: int,
    config: ModelConfig,
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """One vector with the figures of a step over all ranks; stays on the device.

    Args:
        reduce: Sums a tensor over the ranks.

    Returns:
        (2,) loss and gradient norm in a dense model; in a mixture of experts, (4 + L + L * E,): loss, gradient norm, balance
        loss and router z-loss (means over layers and tokens), mean router entropy of each layer, assignments of each expert
        of each layer.
    """
    sums = torch.stack([r.sums for r in results]).sum(0)
    if config.experts == 0:
        return torch.stack([reduce(sums[0]) / valid_tokens, grad_norm])
    counts = torch.stack([r.tokens_per_expert_LE for r in results if r.tokens_per_expert_LE is not None]).sum(0)
    entropy = torch.stack([r.entropy_sum_L for r in results if r.entropy_sum_L is not None]).sum(0)
    packed = reduce(torch.cat([sums, entropy.float(), counts.flatten().float()]))
    loss, router = packed[:1] / valid_tokens, packed[1:3] / (all_tokens * config.layers)
    entropy_end = 3 + config.layers
    entropy_L, counts_R = packed[3:entropy_end] / all_tokens, packed[entropy_end:]
    return torch.cat([loss, grad_norm.reshape(1).to(loss.dtype), router, entropy_L, counts_R])
