"""The ranks of a run as a grid: which of them hold copies of the model, cut its weights, share sequences, or share experts.

From the outermost dimension to the innermost; neighbouring ranks are on one machine, so what exchanges most is innermost:

    replicate R                        copies of the sharded model (HSDP): they meet to sum gradients
    shard S                            ranks that the weights of one copy are cut over (FSDP2)
    data D, context C                  the same S ranks as sequences see them: D groups of C ranks that share theirs
    expert_data G, expert P            the same S ranks as the experts see them: G groups of P ranks that share the experts

Tensor parallelism would be one more dimension, innermost: its parameters are DTensors on it before FSDP2 cuts them further, as
those of the experts are. Pipeline parallelism would be the outermost one, since its ranks exchange least.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from grist_model.config import ModelConfig
from grist_train.config import ComputeConfig


@dataclass(frozen=True)
class Grid:
    """Numbers: of all ranks, of copies of the model, of ranks that share the experts, of ranks that share a sequence."""

    size: int
    replicate: int = 1
    expert: int = 1
    context: int = 1

    @property
    def shards(self) -> int:
        """S: ranks that the weights of one copy are cut over."""
        return self.size // self.replicate

    @property
    def expert_groups(self) -> int:
        """G: ranks of one copy that hold the same experts, cut between them."""
        return self.shards // self.expert

    def cut_over(self, ranks: int) -> Grid:
        """The same ranks for weights that only so many of a copy's are cut over: with more copies of them."""
        return replace(self, replicate=self.size // ranks)


def grid_of(compute: ComputeConfig, size: int) -> Grid:
    """The grid of a run. Raises ValueError where the settings do not divide the number of ranks."""
    grid = Grid(size, compute.replicate, compute.expert_parallel, compute.context_parallel)
    if size % grid.replicate:
        raise ValueError(
            f"compute.replicate {grid.replicate} does not divide the {size} ranks of this run: use a divisor of {size}, or "
            f"start a multiple of {grid.replicate} processes"
        )
    of = f"the {size} ranks of this run"
    if grid.replicate > 1:
        of = f"the {grid.shards} ranks of each of {grid.replicate} copies (compute.replicate)"
    for key, ranks in (("expert_parallel", grid.expert), ("context_parallel", grid.context)):
        if grid.shards % ranks:
            raise ValueError(
                f"compute.{key} {ranks} does not divide {of}: use a divisor of {grid.shards}, or start a multiple of "
                f"{ranks * grid.replicate} processes"
            )
    return grid


def describe(model: ModelConfig, compute: ComputeConfig) -> str:
    """How ranks divide the work, in words; empty where each has samples of its own and the weights are cut over all."""
    found = []
    if compute.replicate > 1:
        found.append(f"{compute.replicate} copies of the model")
    if compute.expert_parallel > 1:
        found.append(f"{model.experts // compute.expert_parallel} of {model.experts} experts on each")
    if compute.context_parallel > 1:
        found.append(f"sequences shared by {compute.context_parallel}")
    return "".join(f", {part}" for part in found)


def weight_mesh(device_type: str, grid: Grid) -> DeviceMesh:
    """(S,), or with copies (R, S): what FSDP2 cuts all weights but those of shared experts over."""
    return _mesh(device_type, grid, {"shard": grid.shards})


def expert_mesh(device_type: str, grid: Grid) -> DeviceMesh:
    """(G, P), or with copies (R, G, P): tokens travel between the P neighbours of a group."""
    return _mesh(device_type, grid, {"expert_data": grid.expert_groups, "expert": grid.expert})


def context_mesh(device_type: str, grid: Grid) -> DeviceMesh:
    """(S / C, C), or with copies (R, S / C, C): keys and values go around the C neighbours that share sequences."""
    return _mesh(device_type, grid, {"data": grid.shards // grid.context, "context": grid.context})


def fsdp_part(mesh: DeviceMesh, shard: str) -> DeviceMesh:
    """What FSDP2 is given of a mesh: the dimension it cuts over, after that of the copies where there are any."""
    assert mesh.mesh_dim_names is not None
    return mesh["replicate", shard] if "replicate" in mesh.mesh_dim_names else mesh[shard]


def _mesh(device_type: str, grid: Grid, inner: dict[str, int]) -> DeviceMesh:
    shape = {"replicate": grid.replicate, **inner} if grid.replicate > 1 else inner
    return init_device_mesh(device_type, tuple(shape.values()), mesh_dim_names=tuple(shape))
