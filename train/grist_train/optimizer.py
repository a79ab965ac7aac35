"""Optimizers: which parameter is updated by what, and how fast."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from grist_train.config import OptimizerConfig
from grist_train.gradient_norms import GradientGroups, clip_by_group
from grist_train.muon import Muon


@dataclass(frozen=True)
class ParameterRoles:
    """Parameters by the way they are updated.

    Attributes:
        matrices: Weights inside the blocks that act as linear maps: attention projections, experts, adapters.
        embeddings: The input embedding (and the head, when they are tied), and that of learned positions.
        decayed: What else takes weight decay: the head and the router.
        plain: Norms, biases, sinks.
    """

    matrices: list[nn.Parameter]
    embeddings: list[nn.Parameter]
    decayed: list[nn.Parameter]
    plain: list[nn.Parameter]


def roles(model: nn.Module) -> ParameterRoles:
    """Sort the trained parameters of a model by shape and name. A stack of biases (E, F) is two-dimensional but no matrix."""
    matrices, embeddings, decayed, plain = [], [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        leaf = name.rsplit(".", 1)[-1]
        if p.ndim < 2 or leaf.startswith("b_") or leaf == "bias":
            plain.append(p)
        elif name.startswith(("embedding", "position_embedding")):
            embeddings.append(p)
        elif name.startswith("blocks.") and ".router." not in name:
            matrices.append(p)
        else:
            decayed.append(p)
    return ParameterRoles(matrices, embeddings, decayed, plain)


def build(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW (fused where the device has it, or with 8-bit averages), preceded by Muon when the run asks for it.

    Every group remembers its peak learning rate as `peak_lr`; `set_learning_rate` scales from there. Raises ImportError where
    the averages are to have 8 bits and torchao is not installed.
    """
    by_role = roles(model)
    use_muon = config.name == "muon"
    decay = config.weight_decay
    groups = [
        {"params": by_role.embeddings, "lr": config.embedding_lr or config.lr, "weight_decay": decay},
        {"params": by_role.decayed + ([] if use_muon else by_role.matrices), "lr": config.lr, "weight_decay": decay},
        {"params": by_role.plain, "lr": config.lr, "weight_decay": 0.0},
    ]
    optimizers = [_adamw([part for group in groups for part in _by_mesh(group)], config)]
    if use_muon and by_role.matrices:
        optimizers.append(Muon(by_role.matrices, config.muon_lr, config.muon_momentum, decay, config.muon_iterations))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = float(group["lr"])
    return optimizers


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    if config.state_bits == 8:
        from grist_train.adamw_8bit import GuardedAdamW8bit

        return GuardedAdamW8bit(groups, config.betas, config.eps)
    # `arm` skips a step by what only a fused AdamW reads. Other devices ("meta", of a planner) take no real step.
    fused = next(p for group in groups for p in group["params"]).device.type in ("cuda", "cpu", "mps")
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=fused)


def _by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A parameter group, cut so that its DTensors live on one mesh: AdamW's fused step takes them all in one operation."""
    meshes: dict[DeviceMesh | None, list[torch.Tensor]] = defaultdict(list)
    for p in group["params"]:
        meshes[p.device_mesh if isinstance(p, DTensor) else None].append(p)
    return [group | {"params": params} for params in meshes.values()]


def set_learning_rate(
    optimizers: list[torch.optim.Optimizer], multiplier: float, step: int, config: OptimizerConfig
) -> None:
    """Scale every group's rate, and warm Muon's momentum up from 0.85: a long memory of early gradients is harmful."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["peak_lr"] * multiplier
            if isinstance(group["lr"], torch.Tensor):  # what is compiled with the step must not be another object
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
            if isinstance(optimizer, Muon):
                progress = min(1.0, step / config.muon_warmup_steps) if config.muon_warmup_steps else 1.0
                group["momentum"] = 0.85 + (config.muon_momentum - 0.85) * progress


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> torch.Tensor:
    """`gradient_norms.clip_by_group` with all of them in one group: the norm before clipping, a scalar on the device."""
    return clip_by_group(GradientGroups((("all", None),), (tuple(parameters),)), largest)[0]
