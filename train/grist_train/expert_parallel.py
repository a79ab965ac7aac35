"""Expert parallelism: a rank holds some of the experts, and every token travels to the experts that were chosen for it.

The ranks are cut into groups of P neighbours (`compute.expert_parallel`). Within a group rank p computes experts p * E / P to
(p + 1) * E / P; the groups are copies of each other as far as experts go, and FSDP2 shards a rank's experts over them (with
`compute.replicate`, over those of one copy of the model). Every rank has tokens of its own, so all else stays as it is without
expert parallelism.

R this rank's tokens, A active experts per token, N = R * A assignments sorted by expert, M rows received, D model width,
E experts, P ranks of a group, G groups of one copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import grist_kernels
from grist_model.config import ModelConfig
from grist_model.lora_layers import LoraExperts
from grist_model.moe import Experts
from grist_model.rows import collect, sort_by_expert, spread
from grist_train.config import ComputeConfig
from grist_train.mesh import grid_of


def check_layout(model: ModelConfig, compute: ComputeConfig, world_size: int) -> None:
    """Raise ValueError where the layout of `compute` does not fit the number of ranks, or leaves experts that cannot be cut.

    That expert_parallel fits the model, TrainConfig has checked.
    """
    grid = grid_of(compute, world_size)
    ranks, groups = grid.expert, grid.expert_groups
    if ranks == 1 or _whole_experts(model.experts, ranks, groups):
        return
    for name, width in (("model.width", model.width), ("model.expert_width", model.expert_width)):
        if width % groups:
            raise ValueError(
                f"compute.expert_parallel {ranks} leaves a rank {model.experts // ranks} of {model.experts} experts, to "
                f"be sharded over {groups} groups, which divide neither them nor {name} {width}: use another "
                "compute.expert_parallel or another number of ranks"
            )


def _whole_experts(experts: int, ranks: int, groups: int) -> bool:
    """Whether every rank can keep whole experts, none of them idle."""
    return experts // ranks % groups == 0


def distribute_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Keep this rank's experts, and let `forward` send tokens to where their experts are. For parameters on "meta".

    Raises ValueError for experts with adapters.

    Parameters become DTensors of the whole (E, ...) on `mesh["expert"]`, so that checkpoints hold the same tensors whatever
    the layout. Afterwards shard them over the rest of the mesh with `shard_dimension`. mesh: as `mesh.expert_mesh` makes it.
    """
    if isinstance(experts, LoraExperts):
        raise ValueError(
            "compute.expert_parallel does not share adapters of experts out: set it to 1, or lora.targets to attention"
        )
    for name, parameter in list(experts.named_parameters(recurse=False)):
        shard = distribute_tensor(parameter.data, mesh["expert"], [Shard(0)])
        setattr(experts, name, nn.Parameter(shard, requires_grad=parameter.requires_grad))
    group = mesh.get_group("expert")

    # Sizes that depend on data, and collectives with a backward: a compiled block breaks its graph here.
    @torch.compiler.disable
    def forward(x_RD: Tensor, ids_RA: Tensor, weights_RA: Tensor) -> Tensor:
        return _forward(experts, group, x_RD, ids_RA, weights_RA)

    experts.forward = forward  # pyright: ignore[reportAttributeAccessIssue]  (torch does not type its decorator)


def shard_dimension(parameter: nn.Parameter, mesh: DeviceMesh) -> Shard:
    """How FSDP2 cuts a rank's experts: into whole experts where they suffice for all groups, else every expert into rows.

    Cut by experts, fewer of them than groups would leave some ranks all the optimizer's work and others none.
    """
    groups, ranks = mesh["expert_data"].size(), mesh["expert"].size()
    return Shard(0) if _whole_experts(parameter.shape[0], ranks, groups) else Shard(1)


def _forward(experts: Experts, group: dist.ProcessGroup, x_RD: Tensor, ids_RA: Tensor, weights_RA: Tensor) -> Tensor:
    """As Experts.forward; all ranks of the group call it together.

    The expert's side multiplies by the routed weight: its kernel needs no copy of its results for the weight's gradient, and
    what comes back is only summed, so that nothing but the rows received is kept for the backward.
    """
    order_N, place_RA, _ = sort_by_expert(ids_RA, experts.w_down.shape[0])  # sorted by expert is sorted by rank
    routes = _agree(ids_RA, experts.w_down.shape[0], group)
    x_ND = spread(x_RD, order_N, place_RA)
    x_MD, weight_M = _Exchange.apply(routes, x_ND, weights_RA.flatten().index_select(0, order_N))
    y_MD = grist_kernels.moe(
        x_MD,
        routes.ids_M[:, None],
        weight_M[:, None],
        _local(experts.w_gate_up),
        _local(experts.w_down),
        None if experts.b_gate_up is None else _local(experts.b_gate_up),
        None if experts.b_down is None else _local(experts.b_down),
        alpha=experts.alpha,
        limit=experts.limit,
    )
    (y_ND,) = _Exchange.apply(routes.reverse(), y_MD)
    return collect(y_ND, order_N, place_RA)


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local(grad_placements=parameter.placements)


@dataclass(frozen=True)
class _Routes:
    """How many rows go where.

    Attributes:
        send, receive: (P,) rows to and from each rank of the group.
        ids_M: Of each row received, its expert's position among this rank's, int64.
    """

    group: dist.ProcessGroup
    send: list[int]
    receive: list[int]
    ids_M: Tensor

    def reverse(self) -> _Routes:
        return _Routes(self.group, self.receive, self.send, self.ids_M)


def _agree(ids_RA: Tensor, experts: int, group: dist.ProcessGroup) -> _Routes:
    """Tell every rank of the group what it will get."""
    ranks = dist.get_world_size(group)
    flat_N = ids_RA.flatten()
    sent_E = flat_N.new_zeros(experts).scatter_add_(0, flat_N, torch.ones_like(flat_N))
    received_E = torch.empty_like(sent_E)
    dist.all_to_all_single(received_E, sent_E, group=group)
    # NCCL and gloo take the sizes of an exchange from the host: the one time that a layer waits for the device.
    send, receive = torch.stack([sent_E, received_E]).view(2, ranks, -1).sum(-1).tolist()
    ids_E = torch.arange(experts // ranks, device=flat_N.device).repeat(ranks)
    return _Routes(group, send, receive, ids_E.repeat_interleave(received_E, output_size=sum(receive)))


def _exchange(rows: Tensor, routes: _Routes) -> Tensor:
    received = rows.new_empty(sum(routes.receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), routes.receive, routes.send, group=routes.group)
    return received


class _Exchange(torch.autograd.Function):
    """Rows to the ranks they are meant for; gradients go the opposite way."""

    @staticmethod
    def forward(ctx, routes: _Routes, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.routes = routes
        return tuple(_exchange(part, routes) for part in rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor):
        return None, *(_exchange(part, ctx.routes.reverse()) for part in gradients)
