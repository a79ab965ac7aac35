"""A model that is run a block at a time out of its directory, so that no more than one block of it is ever in memory.

B rows, T time, D model width, V vocabulary. Everything runs in float32 on the CPU.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from grist_model import checkpoint
from grist_model.layers import norm
from grist_model.rope import RotaryAngles
from grist_model.transformer import Block, softcapped
from grist_model.weight_reading import fill

if TYPE_CHECKING:
    from grist_model.config import ModelConfig
    from grist_model.weight_reading import Weights

ROWS_AT_ONCE = 4


class BlockByBlock:
    """config, weights: of the directory. Raises what `grist_model.load` raises."""

    def __init__(self, directory: Path, stack: ExitStack):
        self.config: ModelConfig
        self.weights: Weights
        self.config, self.weights = checkpoint.opened(directory, stack)
        self._rope = RotaryAngles(self.config) if self.config.positions == "rotary" else None

    def embedded(self, ids_BT: Tensor) -> Tensor:
        """Ids (B, T) -> what the first block sees, (B, T, D)."""
        x_BTD = F.embedding(ids_BT, self._stored("embedding.weight")).float()
        if self._rope is None:
            x_BTD = x_BTD + self._stored("position_embedding.weight")[: ids_BT.shape[1]].float()
        return x_BTD

    def block(self, layer: int) -> Block:
        with torch.device("meta"):
            block = Block(self.config, layer)
        prefix = f"blocks.{layer}."
        block.load_state_dict({name: self._read(prefix + name) for name in block.state_dict()}, assign=True)
        return block.eval()

    @torch.no_grad()
    def through(self, block: Block, x_BTD: Tensor) -> Tensor:
        """The rows after a block, in the memory of those before it."""
        cos, sin = (None, None) if self._rope is None else self._rope(torch.arange(x_BTD.shape[1]))
        for rows in x_BTD.split(ROWS_AT_ONCE):
            rows.copy_(block(rows, cos, sin)[0])
        return x_BTD

    @torch.no_grad()
    def logits(self, x_BTD: Tensor) -> Tensor:
        """After the last block: (B, T, V)."""
        with torch.device("meta"):
            last = norm(self.config)
        last.load_state_dict({name: self._read(f"norm.{name}") for name in last.state_dict()}, assign=True)
        head_VD = self._stored("embedding.weight" if self.config.tied_embeddings else "head.weight")
        return softcapped(F.linear(last(x_BTD), head_VD.float()), self.config.logit_softcap)

    def _read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        found = torch.empty(self.weights.layout.shapes[name], dtype=dtype)
        fill(found, name, self.weights)
        return found

    def _stored(self, name: str) -> Tensor:
        """In the type that is stored: the embedding is often the largest tensor of all."""
        return self._read(name, self.weights.type_of(name))


@torch.no_grad()
def logits_of(directory: Path, ids_BT: Tensor) -> Tensor:
    """(B, T, V) float32 of a model directory."""
    with ExitStack() as stack:
        model = BlockByBlock(directory, stack)
        x_BTD = model.embedded(ids_BT)
        for layer in range(model.config.layers):
            x_BTD = model.through(model.block(layer), x_BTD)
        return torch.cat([model.logits(rows) for rows in x_BTD.split(ROWS_AT_ONCE)])
