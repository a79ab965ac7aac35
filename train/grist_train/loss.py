"""The training loss of one micro-batch. Shapes: B batch, T time, D width, V vocabulary, L layers, E experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from grist_data import Batch
from grist_kernels import linear_cross_entropy
from grist_model.config import ModelConfig
from grist_model.moe import RouterStats
from grist_model.transformer import Transformer


@dataclass(frozen=True)
class MicroBatchResult:
    """What one micro-batch adds to the step: sums, so that they add up over micro-batches and ranks.

    Attributes:
        objective: Scalar to call `backward` on, already divided by the step's global counts.
        sums: (3,) float32: the loss (cross entropy in nats), balance loss, router z-loss.
        tokens_per_expert_LE: Assignments, or None in a dense model.
        entropy_sum_L: Router entropy in nats summed over tokens, or None.
        figures: (n,) float32, what else is measured, summed over what the loss counts, or None.
    """

    objective: torch.Tensor
    sums: torch.Tensor
    tokens_per_expert_LE: torch.Tensor | None
    entropy_sum_L: torch.Tensor | None
    figures: torch.Tensor | None = None


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
    loss_sum, router = cross_entropy(model, config, batch, "sum")
    return with_router(loss_sum, valid_tokens, router, all_tokens, config)


def cross_entropy(
    model: Transformer, config: ModelConfig, batch: Batch, reduction: str
) -> tuple[torch.Tensor, RouterStats | None]:
    """Of the next token, in nats: a scalar for reduction "sum", (B * T,) for "none"; and the router's sums, None in a dense
    model."""
    if config.experts == 0:
        hidden_BTD, router = model.hidden(batch.ids_BT, cu_seqlens=batch.cu_seqlens), None
    else:
        hidden_BTD, router = model.hidden(batch.ids_BT, cu_seqlens=batch.cu_seqlens, return_router=True)
    loss = linear_cross_entropy(
        hidden_BTD.flatten(0, 1),
        model.unembedding,
        batch.targets_BT.flatten(),
        softcap=config.logit_softcap,
        reduction=reduction,
    )
    return loss, router


def with_router(
    loss_sum: torch.Tensor,
    counted: int,
    router: RouterStats | None,
    all_tokens: int,
    config: ModelConfig,
    figures: torch.Tensor | None = None,
) -> MicroBatchResult:
    """The losses of the router beside a loss that is summed over what is counted, of which the whole step has so many."""
    objective = loss_sum / counted
    if router is None:
        zero = torch.zeros_like(loss_sum)
        sums = torch.stack([loss_sum.detach(), zero, zero]).float()
        return MicroBatchResult(objective, sums, None, None, figures)

    per_token = all_tokens * config.layers
    if config.balance == "aux" and config.aux_loss_weight:
        objective = objective + router.aux_loss_sum * (config.aux_loss_weight / per_token)
    if config.router_z_loss_weight:
        objective = objective + router.z_loss_sum * (config.router_z_loss_weight / per_token)
    parts = [loss_sum.detach(), router.aux_loss_sum.detach(), router.z_loss_sum.detach()]
    return MicroBatchResult(
        objective,
        torch.stack([part.float() for part in parts]),
        router.tokens_per_expert_LE.detach(),
        router.entropy_sum_L.detach(),
        figures,
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
        valid_tokens: What the loss counts, over the whole step and all ranks.
        reduce: Sums a tensor over the ranks.

    Returns:
        (2 + n,) loss, gradient norm and the n figures of the results, means over what the loss counts; in a mixture of experts,
        (4 + n + L + L * E,): after those the balance loss and router z-loss (means over layers and tokens), the mean router
        entropy of each layer, and the assignments of each expert of each layer.
    """
    sums = torch.stack([r.sums for r in results]).sum(0)
    figures = [r.figures for r in results if r.figures is not None]
    counted = torch.cat([sums[:1], *([torch.stack(figures).sum(0).float()] if figures else [])])
    parts = [counted]
    if config.experts:
        counts = torch.stack([r.tokens_per_expert_LE for r in results if r.tokens_per_expert_LE is not None]).sum(0)
        entropy = torch.stack([r.entropy_sum_L for r in results if r.entropy_sum_L is not None]).sum(0)
        parts += [sums[1:3], entropy.float(), counts.flatten().float()]
    reduced = reduce(torch.cat(parts)).split([len(part) for part in parts])
    means = reduced[0] / valid_tokens
    out = [means[:1], grad_norm.reshape(1).to(means.dtype), means[1:]]
    if config.experts:
        _, router, entropy_L, counts_R = reduced
        out += [router / (all_tokens * config.layers), entropy_L / all_tokens, counts_R]
    return torch.cat(out)
