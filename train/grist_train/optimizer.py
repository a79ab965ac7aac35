"""Optimizers: which parameter is updated by what, and the clipping of gradients that may be sharded."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from grist_train.config import OptimizerConfig
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
    """AdamW (fused where the device has it), preceded by Muon when the run asks for it.

    Every group remembers its peak learning rate as `peak_lr`; `set_learning_rate` scales from there.
    """
    by_role = roles(model)
    use_muon = config.name == "muon"
    decay = config.weight_decay
    groups = [
        {"params": by_role.embeddings, "lr": config.embedding_lr or config.lr, "weight_decay": decay},
        {"params": by_role.decayed + ([] if use_muon else by_role.matrices), "lr": config.lr, "weight_decay": decay},
        {"params": by_role.plain, "lr": config.lr, "weight_decay": 0.0},
    ]
    device = next(model.parameters()).device.type
    adamw = torch.optim.AdamW(
        [part for g in groups for part in _by_mesh(g)],
        betas=config.betas,
        eps=config.eps,
        fused=device in ("cuda", "cpu", "mps"),
    )
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if use_muon and by_role.matrices:
        optimizers.append(Muon(by_role.matrices, config.muon_lr, config.muon_momentum, decay, config.muon_iterations))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


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
            group["lr"] = group["peak_lr"] * multiplier
            if isinstance(optimizer, Muon):
                progress = min(1.0, step / config.muon_warmup_steps) if config.muon_warmup_steps else 1.0
                group["momentum"] = 0.85 + (config.muon_momentum - 0.85) * progress


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> torch.Tensor:
    """Scale all gradients so that their global norm is at most `largest`; 0 only measures.

    Returns:
        The norm before clipping, a scalar on the device; nothing waits for it.

    Works on any mix of plain and DTensor gradients: squares of local parts are summed over exactly those mesh dimensions that
    shard them. (`torch.nn.utils.clip_grad_norm_` refuses parameters that live on different meshes.)
    """
    groups: dict[tuple, list[torch.Tensor]] = defaultdict(list)
    for p in parameters:
        if isinstance(p.grad, DTensor):
            groups[(p.grad.device_mesh, p.grad.placements)].append(p.grad.to_local())
        elif p.grad is not None:
            groups[(None, ())].append(p.grad)
    if not groups:
        raise ValueError("clip_gradients was called before any gradient was computed")
    total = torch.stack([_squared_norm(local, mesh, places) for (mesh, places), local in groups.items()]).sum()
    norm = total.sqrt().float()
    if largest > 0:
        scale = (largest / (norm + 1e-6)).clamp(max=1.0)
        for local in groups.values():
            for gradient in local:
                gradient.mul_(scale)
    return norm


def _squared_norm(local: list[torch.Tensor], mesh: DeviceMesh | None, placements: tuple) -> torch.Tensor:
    """Sum of squares over the ranks that hold parts of these gradients.

    In float64 where the device has it: rounded to float32 afterwards, the norm is then the same on any number of ranks, and
    with it every clipped update.
    """
    wide = torch.float32 if local[0].device.type == "mps" else torch.float64
    squared = torch.stack([torch.linalg.vector_norm(g, dtype=wide) for g in local]).square().sum()
    for dim, placement in enumerate(placements):
        if not placement.is_replicate():  # Shard, and the _StridedShard of experts, which is no subclass of it
            assert mesh is not None
            dist.all_reduce(squared, group=mesh.get_group(dim))
    return squared
