"""A real training step on a CPU, and the most bytes that PyTorch's allocator had handed out during it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

import grist_model
from grist_data import Batch
from grist_train import distributed, optimizer
from grist_train.config import TrainConfig
from grist_train.context_parallel import own_share, share_routers, sharing_sequences, with_context
from grist_train.distributed import World
from grist_train.loss import language_model_loss


def measured_peak(config: TrainConfig, world: World, micro_batches: int, folder: Path) -> int:
    """Bytes of this rank at the peak of its second step: what was there before it, and what the profiler saw it take.

    The profiler reports every allocation and every release (`profile_memory`), whoever asked for it.
    """
    world = with_context(world, config.compute)
    model = grist_model.build(config.model, device="meta")
    share_routers(model, world)
    distributed.prepare_blocks(model, config.compute)
    distributed.shard(model, world, config.compute)
    model.to_empty(device="cpu")
    grist_model.initialize(model, config.seed)
    optimizers = optimizer.build(model, config.optimizer)
    draw = torch.Generator().manual_seed(world.data_rank)
    shape = (config.batch.micro_size or 1, config.data.sequence_length)
    data = []
    for _ in range(micro_batches):
        ids = torch.randint(config.model.vocab_size, shape, generator=draw)
        data.append(own_share(Batch(ids, ids.clone(), None, ids.numel()), world))
    _step(model, config, data, optimizers, world)
    there = [*model.parameters(), *model.buffers(), *(t for batch in data for t in (batch.ids_BT, batch.targets_BT))]
    there += [v for each in optimizers for state in each.state.values() for v in state.values()]
    before = sum(_bytes(tensor) for tensor in there if isinstance(tensor, torch.Tensor))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _step(model, config, data, optimizers, world)
    path = folder / f"rank-{world.rank}.json"
    profiler.export_chrome_trace(str(path))
    return before + _highest(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def _step(
    model: grist_model.Transformer,
    config: TrainConfig,
    data: list[Batch],
    optimizers: list[torch.optim.Optimizer],
    world: World,
) -> None:
    for number, batch in enumerate(data):
        distributed.set_last_micro_batch(model, number == len(data) - 1, config.compute)
        with sharing_sequences(model, world):
            result = language_model_loss(model, config.model, batch, 1000, 1000)
        result.objective.backward()
        del result
    optimizer.clip_gradients(list(model.parameters()), config.optimizer.clip)
    for each in optimizers:
        each.step()
        each.zero_grad()


def _bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().nbytes()


def _highest(events: list[dict]) -> int:
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    held = highest = 0
    for event in memory:
        held += event["args"]["Bytes"]
        highest = max(highest, held)
    return highest


def on_gloo(rank: int, config: TrainConfig, ranks: int, micro_batches: int, folder: Path) -> None:
    """One process of several: writes its peak to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    group = dist.group.WORLD
    assert group is not None
    peak = measured_peak(config, World(rank, ranks, rank, torch.device("cpu"), group, group), micro_batches, folder)
    (folder / f"peak-{rank}.txt").write_text(str(peak), encoding="utf-8")
    dist.destroy_process_group()
