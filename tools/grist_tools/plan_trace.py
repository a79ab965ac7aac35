"""One rank's step, run for its sizes: the trainer's own model, sharding, loss and optimizers, on fake tensors.

Where the plan of a run and the run differ, this is not a second description of the trainer that could be wrong: it is the
trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import grist_model
from grist_data import Batch
from grist_kernels.launch import Target
from grist_tools import plan_roles as roles
from grist_tools.plan_ledger import Ledger, Peak, Traffic
from grist_tools.plan_pretend import pretending, world_of
from grist_train import distributed, loss, optimizer
from grist_train.config import ComputeConfig, TrainConfig
from grist_train.context_parallel import own_share, share_routers, sharing_sequences, with_context
from grist_train.distributed import World
from grist_train.initial import add_adapters

CUDA_ROUNDING = 512  # bytes; c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize


@dataclass(frozen=True)
class Trace:
    """What a step of one rank takes, and sends for its last micro-batch and the update."""

    peak: Peak
    traffic: Traffic


def trace(config: TrainConfig, ranks: int, micro_size: int, micro_batches: int, gpu: Target | None) -> Trace:
    """The last micro-batch of a step, and the update after it, on rank 0 of `ranks`, in the steady state.

    Clipping is left out: it scales in place and keeps a few numbers, which fake tensors do not have. Gradients that earlier
    micro-batches left are there from the start; so is the optimizer's state. gpu None is a CPU.

    Raises what the trainer raises for a layout that it cannot run.
    """
    compute = config.compute if gpu is None else _on_gpu(config.compute)
    with world_of(ranks) as alone:
        world = with_context(alone, compute)
        model = grist_model.build(config.model, device="meta")
        add_adapters(model, config, world)
        share_routers(model, world)
        distributed.prepare_blocks(model, replace(compute, compile=False))
        distributed.shard(model, world, compute)
        with pretending(gpu):
            model.to_empty(device="cpu")
            optimizers = optimizer.build(model, config.optimizer)
            _settle(model, optimizers)
            ledger = Ledger(rounding=1 if gpu is None else CUDA_ROUNDING, gloo=gpu is None)
            _step(replace(config, compute=compute), model, optimizers, ledger, world, micro_size, micro_batches)
    return Trace(ledger.peak(), ledger.traffic)


def _on_gpu(compute: ComputeConfig) -> ComputeConfig:
    return replace(compute, dtype="bfloat16") if compute.dtype == "auto" else compute


def _settle(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """One update before anything is counted: it makes the optimizers' state, and lets DTensor work out its shardings, for which
    it makes whole tensors under the same fake mode."""
    for parameter in _trained(model):
        parameter.grad = torch.empty_like(parameter)
    for each in optimizers:
        each.step()
        each.zero_grad()


def _step(
    config: TrainConfig,
    model: grist_model.Transformer,
    optimizers: list[torch.optim.Optimizer],
    ledger: Ledger,
    world: World,
    micro_size: int,
    micro_batches: int,
) -> None:
    parameters = _trained(model)
    data = [own_share(_batch(micro_size, config.data.sequence_length), world) for _ in range(micro_batches)]
    ledger.register(roles.PARAMETERS, [*model.parameters(), *model.buffers()])
    ledger.register(roles.OPTIMIZER, _state(optimizers))
    ledger.register(roles.DATA, [part for batch in data for part in (batch.ids_BT, batch.targets_BT)])
    with ledger, _loss_apart(ledger), sharing_sequences(model, world):
        if micro_batches > 1:
            _earlier_gradients(model, config, data[0], ledger)
        distributed.set_last_micro_batch(model, True, config.compute)
        result = loss.language_model_loss(model, config.model, data[-1], 1, 1)
        with ledger.during("backward", roles.ACTIVATIONS):
            result.objective.backward()
        ledger.register(roles.GRADIENTS, [p.grad for p in parameters if p.grad is not None])
        del result
        with ledger.during("optimizer step", roles.UPDATE):
            for each in optimizers:
                each.step()
                each.zero_grad()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _state(optimizers: list[torch.optim.Optimizer]) -> list[torch.Tensor]:
    states = [state for each in optimizers for state in each.state.values()]
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]


def _batch(micro_size: int, sequence_length: int) -> Batch:
    ids = torch.empty(micro_size, sequence_length, dtype=torch.int64)
    return Batch(ids, torch.empty_like(ids), None, ids.numel())


@contextmanager
def _loss_apart(ledger: Ledger) -> Iterator[None]:
    """Lets what the cross entropy makes be told from activations."""
    compute = loss.linear_cross_entropy

    def watched(*args, **kwargs):
        with ledger.during("loss", roles.LOSS):
            return compute(*args, **kwargs)

    with patch.object(loss, "linear_cross_entropy", watched):
        yield


def _earlier_gradients(model: grist_model.Transformer, config: TrainConfig, batch: Batch, ledger: Ledger) -> None:
    """What the micro-batches before the last one leave: this rank's part of the gradients, or all of them, unreduced."""
    if config.compute.reduce_every_micro_batch or not isinstance(next(model.parameters()), DTensor):
        for parameter in _trained(model):
            parameter.grad = torch.empty_like(parameter)
        ledger.register(roles.GRADIENTS, [p.grad for p in _trained(model) if p.grad is not None])
        return
    distributed.set_last_micro_batch(model, False, config.compute)
    result = loss.language_model_loss(model, config.model, batch, 1, 1)
    with ledger.during("backward", roles.ACTIVATIONS):
        result.objective.backward()
    ledger.count_from_here()
