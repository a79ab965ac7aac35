"""What the processes of the tests of layouts compute: one run, step by step, however ranks copy, cut and share it.

A layout is a number of ranks and a ComputeConfig. All of them are given one in-memory dataset, read with `Batches` as a real
run reads it, so that a checkpoint says where the data stands.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from splits_in_memory import split_in_memory
from tiny_house import small

import grist_model
from grist_data import Batches
from grist_model.config import ModelConfig
from grist_train import distributed, optimizer
from grist_train.checkpoint import Checkpoints
from grist_train.config import ComputeConfig, OptimizerConfig
from grist_train.context_parallel import own_share, share_routers, sharing_sequences, with_context
from grist_train.distributed import World
from grist_train.loss import language_model_loss, step_values

SEQUENCES, T, IDS = 8, 16, 64
STEPS, SAVED_AT = 8, 5
# Sinks, a window in every other layer, grouped queries, a shared expert, and losses of the router.
MODEL = small(
    layers=2, heads=4, kv_heads=2, experts=4, active_experts=2, shared_expert_width=8, mlp_bias=True,
    balance="aux", aux_loss_weight=0.05, router_z_loss_weight=0.01, initializer_range=0.1,
)  # fmt: skip
# Four ranks cut each of six experts into rows, two keep three whole ones. Of two experts that are 30 wide and cannot be cut
# into four, four ranks hold two copies.
SIX_EXPERTS = replace(MODEL, experts=6)
TWO_EXPERTS = replace(MODEL, experts=2, width=30, head_width=8, expert_width=18)
OPTIMIZER = OptimizerConfig(name="muon", lr=0.02, muon_lr=0.02, clip=0.5, weight_decay=0.01, muon_iterations=3)


@dataclass(frozen=True)
class Layout:
    name: str
    ranks: int
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    model: ModelConfig = MODEL


def data(world: World) -> Batches:
    """Two micro-batches a rank and step where it has two sequences; in numbers that `text` makes ids of."""
    share = SEQUENCES // world.data_size
    return Batches(
        split_in_memory("text", [700, 900]), T, SEQUENCES, seed=1, rank=world.data_rank, world_size=world.data_size,
        micro_batch_size=max(1, share // 2),
    )  # fmt: skip


def text(numbers: torch.Tensor) -> torch.Tensor:
    """The ids of tokens by their number in the dataset: a text that can be learned."""
    return (3 * numbers + numbers // 7) % IDS


class Run:
    """A model in training, as in grist_train.__main__."""

    def __init__(self, layout: Layout, world: World, folder: Path):
        self.layout, self.world = layout, with_context(world, layout.compute)
        self.model = grist_model.build(layout.model, device="meta")
        share_routers(self.model, self.world)
        distributed.prepare_blocks(self.model, layout.compute)
        distributed.shard(self.model, world, layout.compute)
        self.model.to_empty(device="cpu")
        grist_model.initialize(self.model, seed=0)
        self.optimizers = optimizer.build(self.model, OPTIMIZER)
        self.batches = data(self.world)
        self.checkpoints = Checkpoints(folder, world, keep_last=1, asynchronous=False)

    def steps(self, first: int, last: int) -> list[list[float]]:
        """Loss, gradient norm and the figures of the router, step by step."""
        return [self._step(step) for step in range(first, last)]

    def _step(self, step: int) -> list[float]:
        optimizer.set_learning_rate(self.optimizers, 1.0, step, OPTIMIZER)
        tokens = SEQUENCES * T
        micro_batches = [own_share(batch, self.world) for batch in next(self.batches)]
        counted = [batch.n_valid_tokens for batch in micro_batches]
        assert distributed.sum_on_host([sum(counted)], self.world) == [tokens]
        results = []
        for i, batch in enumerate(micro_batches):
            batch = replace(batch, ids_BT=text(batch.ids_BT), targets_BT=text(batch.targets_BT))
            distributed.set_last_micro_batch(self.model, i == len(micro_batches) - 1, self.layout.compute)
            with sharing_sequences(self.model, self.world):
                results.append(language_model_loss(self.model, self.layout.model, batch, tokens, tokens))
            results[-1].objective.backward()
        norm = optimizer.clip_gradients(list(self.model.parameters()), OPTIMIZER.clip)
        for each in self.optimizers:
            each.step()
            each.zero_grad()
        reduce = functools.partial(distributed.sum_on_device, world=self.world)
        values = step_values(results, norm, tokens, tokens, self.layout.model, reduce)
        return values.tolist()

    def save(self) -> None:
        self.checkpoints.save(SAVED_AT, self.model, self.optimizers, {"batches": self.batches.state_dict()})
        assert self.checkpoints.wait()

    def load(self) -> None:
        state = self.checkpoints.load(SAVED_AT, self.model, self.optimizers)
        self.batches.load_state_dict(state["batches"])


def whole_run(layout: Layout, world: World, folder: Path) -> list[list[float]]:
    """All steps, with a checkpoint in the middle."""
    run = Run(layout, world, folder / layout.name)
    rows = run.steps(0, SAVED_AT)
    run.save()
    return rows + run.steps(SAVED_AT, STEPS)


def resumed(source: str, layout: Layout, world: World, folder: Path) -> list[list[float]]:
    """The steps from the checkpoint of another layout on."""
    run = Run(layout, world, folder / source)
    run.load()
    return run.steps(SAVED_AT, STEPS)


def start_rank(rank: int, ranks: int, layouts: list[Layout], loads: list[tuple[str, Layout]], folder: Path) -> None:
    """One process of as many ranks: every layout in turn, in one process group."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    world = distributed.start("cpu", threads=1)
    found: dict[str, Any] = {layout.name: whole_run(layout, world, folder) for layout in layouts}
    found |= {f"{source} -> {layout.name}": resumed(source, layout, world, folder) for source, layout in loads}
    torch.save(found, folder / f"found-{ranks}-{rank}.pt")
    distributed.stop()
