"""Averages in 8 bits under FSDP2: checkpoints load on another number of ranks. Steps run uncompiled: it takes a minute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from grist_train.checkpoint import Checkpoints
from grist_train.distributed import World, full_state_dict

pytest.importorskip("torchao")
CPU = torch.device("cpu")


def world(rank: int, size: int, store: str) -> World:
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    groups = [dist.new_group(backend="gloo") for _ in range(2)]
    return World(rank, size, rank, CPU, *groups)  # pyright: ignore[reportArgumentType]


def made(size: int):
    """A (192, 64): 8 bits on 1, 2 and 3 ranks. A (50, 128): 25 and 25 rows, or 17, 17 and 16, which blocks do not divide."""
    from grist_train.adamw_8bit import GuardedAdamW8bit

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 192, bias=False), nn.Linear(192, 128), nn.Linear(128, 50, bias=False))
    if size > 1:
        fully_shard(model)
    return model, GuardedAdamW8bit([{"params": list(model.parameters()), "lr": 1e-2}], (0.9, 0.95), 1e-8)


def two_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(2):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()  # the same on every rank, so that FSDP's average is that of one
        optimizer.step()
        optimizer.zero_grad()


def averages(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = optimizer.state_dict()["state"]
    wide = [state[i][name] for i in sorted(state) for name in ("exp_avg", "exp_avg_sq")]
    return [value.full_tensor() if hasattr(value, "full_tensor") else value for value in wide]


def save(rank: int, size: int, folder: str) -> None:
    here = world(rank, size, f"{folder}/store-save")
    model, optimizer = made(size)
    two_steps(model, optimizer)
    checkpoints = Checkpoints(Path(folder) / "checkpoints", here, 1, asynchronous=False)
    checkpoints.save(2, model, [optimizer], {})
    assert checkpoints.wait()
    kept = averages(model, optimizer)
    weights = full_state_dict(model, here)
    if rank == 0:
        torch.save([kept, weights], f"{folder}/kept.pt")
    dist.destroy_process_group()


def load(rank: int, size: int, folder: str) -> None:
    here = world(rank, size, f"{folder}/store-load")
    model, optimizer = made(size)
    Checkpoints(Path(folder) / "checkpoints", here, 1, asynchronous=False).load(2, model, [optimizer])
    kept, weights = torch.load(f"{folder}/kept.pt", weights_only=True)
    loaded = full_state_dict(model, here)
    if rank == 0:
        for name, want in weights.items():
            assert torch.equal(loaded[name], want), name
    for got, want in zip(averages(model, optimizer), kept, strict=True):
        # Other blocks share a scale: one more rounding to 8 bits, of 256 unevenly spaced values.
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.01 * want.abs().max().item())
    two_steps(model, optimizer)
    dist.destroy_process_group()


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(1, 2), (2, 3)])
def test_a_checkpoint_loads_on_another_number_of_ranks(tmp_path, saved_on, loaded_on):
    spawn(save, args=(saved_on, str(tmp_path)), nprocs=saved_on)
    spawn(load, args=(loaded_on, str(tmp_path)), nprocs=loaded_on)
