"""The settings of LoRA adapters. Imports no torch, so command lines start fast."""

from __future__ import annotations

import math
from dataclasses import dataclass

ATTENTION = ("q", "k", "v", "o")
DENSE = ("gate", "up", "down")
EXPERTS = ("w_gate_up", "w_down")
GROUPS = {"attention": ATTENTION, "mlp": DENSE, "experts": EXPERTS, "all": (*ATTENTION, *DENSE, *EXPERTS)}


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al., 2021): W x becomes W x + scale * B A x, and only A and B are trained.

    There is no dropout: it would have to be the same function of seed, step and sample on any number of ranks, and for experts
    that share a matrix product nobody offers it.

    Attributes:
        rank: Rows of A, columns of B.
        alpha: Numerator of the scale.
        rs: The scale is alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732) instead of alpha / rank.
        targets: Which matrices: q, k, v, o (attention); gate, up, down (dense layers and shared experts); w_gate_up, w_down (a
            pair of matrices for each expert); or attention, mlp, experts, all for what there is of them. The router, the
            embeddings and the head are never among them.
        initial: Directory of an adapter (PEFT's format) to go on from. Ranks, scales and targets are then those that are there.
    """

    rank: int = 16
    alpha: float = 32.0
    rs: bool = False
    targets: tuple[str, ...] = ("all",)
    initial: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, but is {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha must be greater than 0, but is {self.alpha}")
        unknown = [target for target in self.targets if target not in GROUPS and target not in GROUPS["all"]]
        if unknown or not self.targets:
            known = ", ".join((*GROUPS["all"], *GROUPS))
            raise ValueError(f"lora.targets must name some of {known}, but is {', '.join(unknown) or 'empty'}")

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rs else self.rank)

    @property
    def matrices(self) -> set[str]:
        """The targets, groups written out."""
        return {name for target in self.targets for name in GROUPS.get(target, (target,))}
