"""Norms of gradients that may be sharded, by the part of the model they belong to, and their clipping.

N gradients of one layout, G groups.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

Label = tuple[str, int | None]


@dataclass(frozen=True)
class GradientGroups:
    """Trained parameters by what they are part of.

    Attributes:
        labels: (kind, layer) of each group, the layer None outside of the blocks or where layers are not told apart.
        parameters: Those of each group.
    """

    labels: tuple[Label, ...]
    parameters: tuple[tuple[nn.Parameter, ...], ...]

    def row(self, norms_G: list[float]) -> dict[str, float | list[float]]:
        """As a row of `metrics.jsonl` has them: `grad_norm/KIND`, and where layers are told apart `grad_norm_by_layer`."""
        squares: dict[str, float] = defaultdict(float)
        layers: dict[int, float] = defaultdict(float)
        for (kind, layer), norm in zip(self.labels, norms_G, strict=True):
            squares[kind] += norm**2
            if layer is not None:
                layers[layer] += norm**2
        row: dict[str, float | list[float]] = {f"grad_norm/{kind}": _root(square) for kind, square in squares.items()}
        if layers:
            row["grad_norm_by_layer"] = [_root(layers[layer]) for layer in sorted(layers)]
        return row


def _root(square: float) -> float:
    return float(f"{math.sqrt(square):.7g}")  # the digits of a float32


def gradient_groups(model: nn.Module, by_layer: bool = False) -> GradientGroups:
    """embedding, attention, experts, router, mlp (dense and shared), norms and head, as far as the model has them; in a tied
    model the embedding is the head as well. Adapters count to what they adapt."""
    groups: dict[Label, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            layer = int(parts[1]) if by_layer and parts[0] == "blocks" else None
            groups[_kind(parts), layer].append(parameter)
    return GradientGroups(tuple(groups), tuple(tuple(parameters) for parameters in groups.values()))


def _kind(parts: list[str]) -> str:
    if any(part.endswith("norm") for part in parts):
        return "norms"
    if parts[0] in ("embedding", "position_embedding"):
        return "embedding"
    for kind in ("router", "experts", "attention", "mlp", "head"):
        if kind in parts:
            return kind
    raise ValueError(
        f"the parameter {'.'.join(parts)} belongs to no known part of a model: name it in gradient_norms._kind"
    )


def clip_by_group(groups: GradientGroups, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale all gradients so that their global norm is at most `largest`; 0 only measures.

    Returns:
        Before clipping, float32 on the device: the global norm, 0-dimensional, and those of the groups (G,), 0 for a group
        without a gradient. Nothing waits for them.

    Raises:
        ValueError: there is no gradient at all.

    Works on any mix of plain and DTensor gradients: squares of local parts are summed over exactly those mesh dimensions that
    shard them, all groups in one collective. (`torch.nn.utils.clip_grad_norm_` refuses parameters that live on different
    meshes.)
    """
    layouts = _by_layout(groups)
    if not layouts:
        raise ValueError("gradients were to be clipped before any was computed")
    per_layout = [_squared_norms(local_G, mesh, places) for (mesh, places), local_G in layouts.items()]
    squares_G = torch.stack(per_layout).sum(0)
    norm = squares_G.sum().sqrt().float()
    if largest > 0:
        scale = (largest / (norm + 1e-6)).clamp(max=1.0)
        for local_G in layouts.values():
            for gradient in (gradient for local in local_G for gradient in local):
                gradient.mul_(scale)
    return norm, squares_G.sqrt().float()


Layout = tuple[DeviceMesh | None, tuple]


def _by_layout(groups: GradientGroups) -> dict[Layout, list[list[torch.Tensor]]]:
    """This rank's parts of the gradients: for every mesh and way of sharding, a list for each group."""
    layouts: dict[Layout, list[list[torch.Tensor]]] = defaultdict(lambda: [[] for _ in groups.parameters])
    for group, parameters in enumerate(groups.parameters):
        for p in parameters:
            if isinstance(p.grad, DTensor):
                layouts[p.grad.device_mesh, p.grad.placements][group].append(p.grad.to_local())
            elif p.grad is not None:
                layouts[None, ()][group].append(p.grad)
    return layouts


def _squared_norms(local_G: list[list[torch.Tensor]], mesh: DeviceMesh | None, placements: tuple) -> torch.Tensor:
    """(G,) sums of squares over the ranks that hold parts of these gradients.

    In float64 where the device has it: rounded to float32 afterwards, the norm is then the same on any number of ranks, and
    with it every clipped update.
    """
    gradients = [gradient for local in local_G for gradient in local]
    device = gradients[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    squares_N = torch.stack([torch.linalg.vector_norm(g, dtype=wide) for g in gradients]).square()
    membership_GN = _membership(tuple(len(local) for local in local_G), device)
    # Not a product with zeros and ones: a NaN in one group would be one in all.
    squares_G = torch.where(membership_GN, squares_N, torch.zeros((), dtype=wide, device=device)).sum(1)
    for dim, placement in enumerate(placements):
        if not placement.is_replicate():  # Shard, and the _StridedShard of experts, which is no subclass of it
            assert mesh is not None
            dist.all_reduce(squares_G, group=mesh.get_group(dim))
    return squares_G


@functools.lru_cache(maxsize=16)
def _membership(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(G, N) bool: gradient n is in group g. Remembered, because bringing it to a device waits for the device."""
    group_N = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return (group_N == torch.arange(len(sizes))[:, None]).to(device)
