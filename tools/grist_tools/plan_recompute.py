"""What activation checkpointing keeps of a block and computes again, as grist_train.recompute does it.

Shape letters: D model width, N query heads, K key/value heads, H head width, L layers, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from grist_train.step_config import EveryBlocks

if TYPE_CHECKING:
    from grist_model.config import ModelConfig


@dataclass(frozen=True)
class Again:
    """Shares of all blocks, 0 to 1, of which the backward computes something a second time.

    Attributes:
        projections: The products before and behind attention.
        attention: Attention itself; with sequences that are shared, its exchange.
        feed_forward: Router, experts and the exchange of their tokens, or the dense layer's products.
        moved: What only moves data.
    """

    projections: float
    attention: float
    feed_forward: float
    moved: float


def again(model: ModelConfig, kind: str | EveryBlocks, on_gpu: bool) -> Again:
    """on_gpu: uncompiled, where launches of kernels are no operations that a policy sees, so that attention runs again."""
    if kind == "selective":
        return Again(0.0, 1.0 if on_gpu else 0.0, 1.0 if model.experts else 0.0, 1.0)
    share = recomputed_blocks(model.layers, kind) / model.layers
    return Again(share, share, share, share)


def recomputed_blocks(layers: int, kind: str | EveryBlocks) -> int:
    """How many blocks keep their input only."""
    if isinstance(kind, EveryBlocks):
        return -(-layers // kind.every)
    return layers if kind == "block" else 0


def described(kind: str | EveryBlocks) -> str:
    """In words; empty where nothing is computed again."""
    if isinstance(kind, EveryBlocks):
        return f"one block in {kind.every} recomputed"
    return {"none": "", "block": "blocks recomputed", "selective": "all but products recomputed"}[kind]
