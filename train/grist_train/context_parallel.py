"""Context parallelism: the ranks of a group share every sequence of a micro-batch, and attention goes around them in a ring.

`compute.context_parallel` C: neighbouring ranks read the same samples, and each keeps two of 2 * C equal pieces of every
sequence, one from its beginning and one from its end, so that all have the same share of causal attention to compute
(grist_kernels.attention.ring). All else in a model looks at one token at a time, but for the balance loss of routers. Losses
and figures are sums over tokens: they add up over these ranks as over any others, and weights are cut over them too.

B batch, T tokens of this rank's share, D model width, E experts, A active experts per token, R = B * T.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from grist_data import Batch
from grist_kernels import zigzag_split
from grist_model.moe import LayerStats, Router
from grist_model.transformer import Transformer
from grist_train.config import ComputeConfig
from grist_train.distributed import World
from grist_train.mesh import context_mesh, grid_of


def with_context(world: World, compute: ComputeConfig) -> World:
    """The world, with the ranks that share sequences with this one. All ranks call it together.

    Raises ValueError where the layout does not fit the number of ranks.
    """
    ranks = compute.context_parallel
    if ranks == 1:
        return world
    mesh = context_mesh(world.device.type, grid_of(compute, world.size))
    return replace(world, context=ranks, context_group=mesh.get_group("context"))


def own_share(batch: Batch, world: World) -> Batch:
    """This rank's pieces of every sequence of a micro-batch, (B, T / C); the batch itself where sequences are not shared.

    The first rank of a group counts the targets of all: only sums over the ranks mean anything, and a count of this rank's own
    would have to wait for the device.

    Raises ValueError for packed documents, and for sequences that cannot be cut into 2 * C equal pieces.
    """
    if world.context == 1:
        return batch
    if batch.cu_seqlens is not None:
        raise ValueError(
            "compute.context_parallel does not keep attention inside documents, but the batch has document borders: set "
            "data.document_masks to false and data.packing to none"
        )
    place = world.rank % world.context
    ids_BT, targets_BT = (zigzag_split(x, place, world.context) for x in (batch.ids_BT, batch.targets_BT))
    return Batch(ids_BT, targets_BT, None, batch.n_valid_tokens if place == 0 else 0)


def share_routers(model: Transformer, world: World) -> None:
    """Let the balance loss of every router be that of whole sequences; once, before the model is sharded."""
    if world.context_group is not None:
        for router in model.routers():
            router.forward = functools.partial(_routed, router, router.forward, world.context_group)


def _routed(
    router: Router, forward: Callable[..., tuple], group: dist.ProcessGroup, x_BTD: Tensor, return_stats: bool = False
) -> tuple[Tensor, Tensor, LayerStats | None]:
    """As Router.forward. The balance loss is a product of two sums over a sequence: E / (A * T) * sum_e counts_e p_e
    (grist_model.moe.RouterStats). The counts, which have no gradient, are summed over the group first; the shares that the
    ranks have of the second sum then add up like any other loss.
    """
    ids_RA, weights_RA, stats = forward(x_BTD, return_stats)
    if stats is None:
        return ids_RA, weights_RA, None
    (B, T, _), (E, A) = x_BTD.shape, (router.weight.shape[0], ids_RA.shape[1])
    bias_E = None if router.bias is None else router.bias.float()
    p_BE = F.linear(x_BTD.float(), router.weight.float(), bias_E).softmax(-1).sum(1)
    chosen = ids_RA.reshape(B, T * A)
    counts_BE = torch.zeros_like(p_BE).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=p_BE.dtype))
    dist.all_reduce(counts_BE, group=group)
    aux = (counts_BE * p_BE).sum() * (E / (A * T * dist.get_world_size(group)))
    return ids_RA, weights_RA, stats._replace(aux_loss_sum=aux)


@contextmanager
def sharing_sequences(model: Transformer, world: World) -> Iterator[None]:
    """Inside, the model takes batches for this rank's share of them. Not meant for evaluation, where ranks have whole ones."""
    model.context_group = world.context_group
    try:
        yield
    finally:
        model.context_group = None
