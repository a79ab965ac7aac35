"""The loss of pairs of answers (DPO).

P pairs, S = 2 * P sequences (chosen, rejected, chosen, ...), T their tokens end to end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grist_model.config import ModelConfig
from grist_model.moe import RouterStats
from grist_model.transformer import Transformer
from grist_train.loss import MicroBatchResult, cross_entropy, with_router
from grist_train.preference_batches import PairBatch
from grist_train.preference_config import PreferenceConfig

# What `preference_loss` measures besides the loss, means over the pairs of a step: the share whose chosen answer has the higher
# reward, and the mean rewards, beta * (log p - log p_reference), whose difference is the margin.
FIGURES = ("preference_accuracy", "reward_margin", "reward_chosen", "reward_rejected")


def answer_log_probabilities(
    model: Transformer, config: ModelConfig, batch: PairBatch
) -> tuple[Tensor, RouterStats | None]:
    """-> (S,) float32 sums over the tokens of each answer, in nats, and the router's sums."""
    loss_T, router = cross_entropy(model, config, batch, "none")
    n_sequences = 2 * batch.n_valid_tokens
    # Split and summed one by one: adding at indices would sum in another order every time on a GPU.
    log_p_S = -torch.stack([part.sum() for part in loss_T.float().split(list(batch.lengths))[:n_sequences]])
    return log_p_S, router


def preference_loss(
    model: Transformer,
    config: ModelConfig,
    batch: PairBatch,
    preferences: PreferenceConfig,
    all_pairs: int,
    all_tokens: int,
) -> MicroBatchResult:
    """all_pairs, all_tokens: of the whole step, over all ranks; they divide the pairs' losses and the router's."""
    assert batch.reference_S is not None
    assert batch.answer_tokens_S is not None
    log_p_S, router = answer_log_probabilities(model, config, batch)
    reward_P2 = preferences.beta * (log_p_S - batch.reference_S).view(-1, 2)
    margin_P = reward_P2[:, 0] - reward_P2[:, 1]
    smoothing = preferences.label_smoothing
    loss_P = -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P)
    if preferences.sft_weight:
        loss_P = loss_P - preferences.sft_weight * (log_p_S / batch.answer_tokens_S)[0::2]
    with torch.no_grad():
        figures = torch.stack([(margin_P > 0).sum(), margin_P.sum(), *reward_P2.sum(0)])
    return with_router(loss_P.sum(), all_pairs, router, all_tokens, config, figures)
