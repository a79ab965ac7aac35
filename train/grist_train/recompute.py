"""Activation checkpointing: what a block keeps of its forward for its backward, and what it computes again (Chen et al., 2016).

`selective` keeps what is dear to compute and small to keep, the outputs of matrix products, and computes the rest again (as
Korthikanti et al., 2022, and torchtitan's per-op policy).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from grist_model.moe import Experts
from grist_train.config import ComputeConfig, EveryBlocks

# Products with a weight (F.linear becomes one of the two), and attention: the CPU's, and Gristmill's kernel, which is an op in
# compiled code only (grist_kernels.two_faces). In eager mode the kernels are autograd functions, whose launches no policy sees:
# they run again.
_KEPT = frozenset(
    {"aten::mm", "aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu", "gristmill::attention"}
)


def prepare(block: nn.Module, layer: int, config: ComputeConfig) -> None:
    """Let the block of a layer do what `compute.activation_checkpointing` and `compute.compile` ask for."""
    kind = config.activation_checkpointing
    if kind == "selective":
        _select(block, config.compile)
        return
    # Compiled inside of the recomputation: torch runs all of a checkpointed call uncompiled, without a word, once there is
    # a graph break in it, and the hooks of sharded experts are one.
    forward = torch.compile(block.forward) if config.compile else block.forward
    if kind == "block" or (isinstance(kind, EveryBlocks) and layer % kind.every == 0):
        forward = _again(forward)
    block.forward = forward


def _select(block: nn.Module, compiled: bool) -> None:
    """Each half of a block by itself: experts are gathered by hooks of their own, whose operations are not the same in the
    second forward, and a policy counts them. So a half with experts is computed again whole."""
    for half in (block.get_submodule("attention"), block.get_submodule("mlp")):
        if any(isinstance(module, Experts) for module in half.modules()):
            half.forward = _again(torch.compile(half.forward) if compiled else half.forward)
        else:
            # The compiler has to see the policy to follow it: what is compiled inside of it would be computed again whole.
            forward = _again(half.forward, functools.partial(create_selective_checkpoint_contexts, _policy))
            half.forward = torch.compile(forward) if compiled else forward


def _again(forward: Callable[..., Any], contexts: Callable[[], Any] | None = None) -> Callable[..., Any]:
    """The same function, computed again in the backward, but for what the contexts keep."""
    options = {} if contexts is None else {"context_fn": contexts}
    return functools.partial(checkpoint, forward, use_reentrant=False, **options)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """PyTorch asks it for every operation."""
    return CheckpointPolicy.MUST_SAVE if op.name() in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
