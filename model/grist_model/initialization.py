"""Initial weights that depend on (seed, parameter name) and nothing else: not on world size, sharding or device.

Every value is drawn on the CPU, in blocks along the first axis, each from a generator seeded by (seed, name, block). A
shard of a parameter draws the blocks it touches and keeps its part.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from grist_model.config import ModelConfig
from grist_model.local_part import local_part
from grist_model.transformer import Transformer, plain_name

ROWS_PER_BLOCK = 256  # of a matrix; of experts' weights (E, in, out) a block is one expert


def initialize(model: Transformer, seed: int) -> None:
    """Fill every parameter of a model in place; of a DTensor (FSDP2) only the local part is drawn.

    Matrices and expert weights: normal(0, initializer_range); those that write to the residual stream (attention
    output, down projections) divided by sqrt(2 * layers), as GPT-2. Norms: one. Biases and sinks: zero. Selection
    biases: zero.

    Raises ValueError for parameters on the meta device.
    """
    config = model.config
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                raise ValueError(f"{name} is on the meta device: call model.to_empty(device=...) before initialize")
            _fill(plain_name(name), parameter, config, seed)
        for router in model.routers():
            if router.selection_bias is not None:
                router.selection_bias.zero_()
    if model.rope is not None:
        model.rope.reset()


def _fill(name: str, parameter: nn.Parameter, config: ModelConfig, seed: int) -> None:
    local, offset = local_part(parameter)
    if parameter.dim() == 1 or name.endswith(("b_gate_up", "b_down")):
        local.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        return
    local.copy_(drawn(name, tuple(parameter.shape), offset, tuple(local.shape), _std(name, config), seed))


def _std(name: str, config: ModelConfig) -> float:
    writes_residual = name.endswith(("attention.o.weight", "experts.w_down", ".down.weight"))
    return config.initializer_range / math.sqrt(2 * config.layers) if writes_residual else config.initializer_range


def drawn(
    name: str, shape: tuple[int, ...], offset: tuple[int, ...], size: tuple[int, ...], std: float, seed: int
) -> Tensor:
    """The part of a parameter that starts at `offset` and has `size`: float32, on the CPU."""
    part = torch.empty(size)
    if part.numel() == 0:
        return part
    rows = 1 if len(shape) == 3 else ROWS_PER_BLOCK
    first, last = offset[0], offset[0] + size[0]
    columns = tuple(slice(start, start + length) for start, length in zip(offset[1:], size[1:], strict=True))
    for block in range(first // rows, -(-last // rows)):
        start, stop = block * rows, min((block + 1) * rows, shape[0])
        generator = torch.Generator().manual_seed(_block_seed(seed, name, block))
        values = torch.empty(stop - start, *shape[1:]).normal_(0.0, std, generator=generator)
        low, high = max(start, first), min(stop, last)
        part[low - first : high - first] = values[(slice(low - start, high - start), *columns)]
    return part


def _block_seed(seed: int, name: str, block: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # manual_seed wants a signed 64-bit number
