"""Cross entropy of a linear layer's logits: the definition, holding all the logits. R rows, D model width, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels.precision import upcast


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """(1 - s) * (lse - logit[target]) + s * (lse - mean(logits)) + z_loss * lse^2 with lse = logsumexp(logits), per row."""
    logits_RV = upcast(hidden) @ upcast(weight).T
    if softcap is not None:
        logits_RV = softcap * torch.tanh(logits_RV / softcap)
    valid = targets != ignore_index
    lse = logits_RV.logsumexp(-1)
    picked = logits_RV.gather(-1, targets.where(valid, 0).unsqueeze(-1)).squeeze(-1)
    loss = lse - (1 - label_smoothing) * picked + z_loss * lse.square()
    if label_smoothing:
        loss = loss - label_smoothing * logits_RV.mean(-1)
    loss = loss.where(valid, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / valid.sum().clamp(min=1)  # no valid row: zero, not NaN
