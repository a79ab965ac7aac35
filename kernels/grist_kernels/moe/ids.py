"""Ids of experts on a CPU, where looking at them costs no synchronisation."""

from __future__ import annotations

from torch import Tensor


def check_ids(expert_ids: Tensor, experts: int) -> None:
    """Raise ValueError unless all ids are in [0, experts). There is at least one id."""
    low, high = (bound.item() for bound in expert_ids.aminmax())
    if low < 0 or high >= experts:
        raise ValueError(f"moe: expert_ids must be in [0, {experts}), but range from {low} to {high}")
