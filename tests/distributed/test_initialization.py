"""Initial weights are the same on any number of ranks, however parameters are sharded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard
from torch.multiprocessing.spawn import spawn

from grist_model import ModelConfig, build, initialize, load, save

# 3 experts and 301 rows on 2 ranks: uneven shards, and shards that begin inside a block of rows.
CONFIG = ModelConfig(
    vocab_size=301, layers=2, width=32, heads=2, kv_heads=1, experts=3, expert_width=20, active_experts=2
)


def placement(parameter: torch.nn.Parameter) -> Shard:
    """Experts along their second axis, as with more ranks than experts; the rest along the first."""
    return Shard(1) if parameter.dim() == 3 and parameter.shape[1] % 2 == 0 else Shard(0)


def check_rank(rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    expected = dict(build(CONFIG).named_parameters())
    for shard_placement in (None, placement):
        model: Any = build(CONFIG, device="meta")
        for block in model.blocks:
            fully_shard(block.mlp.experts, mesh=mesh, shard_placement_fn=shard_placement)
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().fill_(float("nan"))
        initialize(model, seed=0)
        for name, parameter in model.named_parameters():
            assert parameter.to_local().numel() < expected[name].numel(), f"{name} is not sharded"
            assert torch.equal(parameter.full_tensor(), expected[name]), f"{name} differs on {world_size} ranks"
        compare_a_step(model, rank)
    save_and_load(model, Path(store).parent / "model", rank)
    dist.destroy_process_group()


def compare_a_step(model: Any, rank: int) -> None:
    """hidden as an FSDP forward method: nested units gather their weights, gradients equal those of one process."""
    register_fsdp_forward_method(model, "hidden")
    ids = torch.randint(0, 301, (4, 16), generator=torch.Generator().manual_seed(1))
    alone: Any = build(CONFIG)
    for run, rows in ((alone, ids), (model, ids[2 * rank : 2 * rank + 2])):
        hidden, stats = run.hidden(rows, return_router=True)
        (hidden.square().sum() + stats.aux_loss_sum + stats.z_loss_sum).backward()
    expected = {name: p.grad for name, p in alone.named_parameters()}
    for name, parameter in model.named_parameters():
        if name == "head.weight":  # not used by hidden
            continue
        mean_over_ranks = parameter.grad.full_tensor() * 2
        torch.testing.assert_close(mean_over_ranks, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def save_and_load(model: Any, directory: Path, rank: int) -> None:
    """Shards are refused; gathered, they make the directory of the whole model."""
    with pytest.raises(ValueError, match="is sharded"):
        save(model, directory)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        save(state, directory, config=CONFIG)
        for name, tensor in build(CONFIG).state_dict().items():
            assert torch.equal(load(directory).state_dict()[name], tensor), name
    dist.barrier()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks_hold_the_values_of_one(tmp_path: Path):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    spawn(check_rank, args=(2, str(tmp_path / "store")), nprocs=2)
