"""Muon and clipping on FSDP2 shards give what they give on whole matrices: 2 and 4 ranks, uneven rows, few experts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn

from grist_train.gradient_norms import GradientGroups, clip_by_group
from grist_train.muon import Muon

# 10 rows on 4 ranks: shards of 3, 3, 3 and 1. 3 experts on 4 ranks: one rank has none. Five equal shapes: an uneven deal.
SHAPES = [(10, 6), (7, 9), (3, 8, 5), (12, 4), (12, 4), (12, 4), (12, 4), (12, 4), (1, 6)]


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=draw) for shape in SHAPES]


def three_steps(params: list[torch.nn.Parameter], place) -> list[torch.Tensor]:
    """Clip and step three times; returns the gradient norms, of all and of two groups."""
    optimizer = Muon(params, lr=0.05, momentum=0.9, weight_decay=0.1)
    groups = GradientGroups((("even", None), ("odd", None)), (tuple(params[::2]), tuple(params[1::2])))
    norms = []
    for step in range(3):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = place(g)
        norm, norms_G = clip_by_group(groups, 1.0)
        norms.append(torch.cat([norm[None], norms_G]))
        optimizer.step()
    return norms


def check_rank(rank: int, size: int, store: str, replicate: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    if replicate:
        mesh, placements = init_device_mesh("cpu", (2, size // 2)), (Replicate(), Shard(0))
    else:
        mesh, placements = init_device_mesh("cpu", (size,)), (Shard(0),)

    def place(tensor: torch.Tensor) -> DTensor:
        return distribute_tensor(tensor, mesh, placements)

    whole = parameters()
    sharded = [torch.nn.Parameter(place(p.detach().clone())) for p in whole]
    want_norms, got_norms = three_steps(whole, lambda g: g), three_steps(sharded, place)
    for want, got in zip(want_norms, got_norms, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    for i, (want, got) in enumerate(zip(whole, sharded, strict=True)):
        assert isinstance(got, DTensor)
        torch.testing.assert_close(
            got.full_tensor(), want.detach(), rtol=1e-4, atol=1e-5, msg=lambda m, i=i: f"{SHAPES[i]}: {m}"
        )
    dist.destroy_process_group()


@pytest.mark.parametrize(("size", "replicate"), [(2, False), (4, False), (4, True)])
def test_shards_equal_whole_matrices(tmp_path, size, replicate):
    spawn(check_rank, args=(size, str(tmp_path / "store"), replicate), nprocs=size)
