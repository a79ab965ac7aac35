"""What the processes of the tests of expert parallelism compute: gradients, steps and checkpoints of one model in many layouts.

A layout is (ranks, ranks that share the experts). Everything is drawn from seeds and cut into shares, so that every layout is
given the same whole batch.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_house import small
from torch.distributed.tensor import DTensor

import grist_model
from grist_data import Batch
from grist_model.config import ModelConfig
from grist_model.moe import Experts
from grist_train import distributed, optimizer
from grist_train.checkpoint import Checkpoints
from grist_train.config import ComputeConfig, OptimizerConfig
from grist_train.distributed import World, full_state_dict
from grist_train.expert_parallel import distribute_experts
from grist_train.loss import language_model_loss, step_values
from grist_train.mesh import Grid, expert_mesh

SEQUENCES, T = 8, 16
STEPS, SAVED_AT, RESUMED = 50, 25, 4
# One layer, for the sake of time; gradients are compared in two. Every part that an expert layer may have. Of 4 experts every
# layout keeps whole ones; of 6, two groups cut 3 a rank into rows.
PARTS = {"mlp_bias": True, "shared_expert_width": 8, "balance": "bias", "router_z_loss_weight": 0.01}
MODELS = {
    "4 experts": small(layers=1, experts=4, active_experts=2, initializer_range=0.1, **PARTS),
    "6 experts": small(layers=1, experts=6, active_experts=3, initializer_range=0.1, **PARTS),
}
OPTIMIZER = OptimizerConfig(name="muon", lr=0.02, muon_lr=0.02, clip=0.5, weight_decay=0.01, muon_iterations=3)


@dataclass(frozen=True)
class Layout:
    """One way to compute a model."""

    model: str
    ranks: int
    expert_parallel: int
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    @property
    def name(self) -> str:
        return f"{self.model}, {self.ranks} ranks, expert_parallel {self.expert_parallel}"


def batches(step: int, world: World, micro_batches: int) -> list[Batch]:
    """This rank's share of a step: sequences that count in one of four strides, with errors."""
    draw = torch.Generator().manual_seed(step)
    start, stride = (torch.randint(high, (SEQUENCES, 1), generator=draw) for high in (64, 4))
    ids = (start + torch.arange(T + 1) * (2 * stride + 1)) % 64
    noise = torch.randint(64, ids.shape, generator=draw)
    ids = torch.where(torch.rand(ids.shape, generator=draw) < 0.1, noise, ids)
    share = SEQUENCES // world.size
    rows = ids[world.rank * share : (world.rank + 1) * share]
    return [Batch(p[:, :-1], p[:, 1:], None, p[:, 1:].numel()) for p in rows.split(share // micro_batches)]


def build(config: ModelConfig, layout: Layout, world: World, dtype: torch.dtype = torch.float32) -> Any:
    model = grist_model.build(config, device="meta", dtype=dtype)
    compute = replace(layout.compute, expert_parallel=layout.expert_parallel)
    distributed.prepare_blocks(model, compute)
    distributed.shard(model, world, compute)
    model.to_empty(device="cpu")
    grist_model.initialize(model, seed=0)
    return model


def backward(model: Any, step: int, layout: Layout, world: World, micro_batches: int = 1) -> list:
    tokens, results = SEQUENCES * T, []
    for i, batch in enumerate(batches(step, world, micro_batches)):
        distributed.set_last_micro_batch(model, i == micro_batches - 1, layout.compute)
        results.append(language_model_loss(model, model.config, batch, tokens, tokens))
        results[-1].objective.backward()
    return results


def gradients(layout: Layout, world: World) -> dict[str, torch.Tensor]:
    """Of the first step in two micro-batches, whole, in float64: float32 loses more than 1e-6 in sums that cancel."""
    exact, distributed.DTYPES["float32"] = distributed.DTYPES["float32"], torch.float64
    try:
        layout = replace(layout, compute=replace(layout.compute, dtype="float32"))
        model = build(replace(MODELS[layout.model], layers=2), layout, world, torch.float64)
        backward(model, 0, layout, world, micro_batches=2)
    finally:
        distributed.DTYPES["float32"] = exact
    found = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


class Run:
    """A model in training, as in grist_train.__main__."""

    def __init__(self, layout: Layout, world: World, folder: Path):
        self.layout, self.world = layout, world
        self.config = MODELS[layout.model]
        self.model = build(self.config, layout, world)
        self.optimizers = optimizer.build(self.model, OPTIMIZER)
        self.checkpoints = Checkpoints(folder, world, keep_last=1, asynchronous=False)

    def steps(self, first: int, last: int) -> list[list[float]]:
        """Loss, gradient norm and the figures of the router, step by step."""
        rows = []
        for step in range(first, last):
            optimizer.set_learning_rate(self.optimizers, 1.0, step, OPTIMIZER)
            results = backward(self.model, step, self.layout, self.world)
            norm = optimizer.clip_gradients(list(self.model.parameters()), OPTIMIZER.clip)
            for each in self.optimizers:
                each.step()
                each.zero_grad()
            values = step_values(
                results, norm, SEQUENCES * T, SEQUENCES * T, self.config,
                lambda x: distributed.sum_on_device(x, self.world),
            )  # fmt: skip
            self.model.update_selection_bias(values[4 + self.config.layers :].view(self.config.layers, -1))
            rows.append(values.tolist())
        return rows

    def save(self) -> None:
        self.checkpoints.save(SAVED_AT, self.model, self.optimizers, {})
        assert self.checkpoints.wait()

    def load(self) -> None:
        self.checkpoints.load(SAVED_AT, self.model, self.optimizers)


def whole_run(layout: Layout, world: World, folder: Path) -> list[list[float]]:
    """All steps, with a checkpoint in the middle and the portable weights at the end."""
    run = Run(layout, world, folder / layout.name)
    rows = run.steps(0, SAVED_AT)
    run.save()
    rows += run.steps(SAVED_AT, STEPS)
    state = full_state_dict(run.model, world)
    if world.is_main:
        torch.save(state, folder / f"{layout.name}.pt")
    return rows


def resumed(source: str, layout: Layout, world: World, folder: Path) -> list[list[float]]:
    """The next steps from the checkpoint of another layout."""
    run = Run(layout, world, folder / source)
    run.load()
    return run.steps(SAVED_AT, SAVED_AT + RESUMED)


def routing(case: str, rank: int, ranks: int, experts: int) -> torch.Tensor:
    """(R, 2) chosen experts of this rank's tokens."""
    draw = torch.Generator().manual_seed(rank)
    tokens = 0 if case == "a rank without tokens" and rank == 1 else 5 + rank
    ids = torch.rand(tokens, experts, generator=draw).topk(2, dim=1).indices
    if case == "all to one rank":
        return ids.new_tensor([0, 1]).expand(tokens, 2) if experts // ranks > 1 else ids.new_zeros(tokens, 2)
    return ids.new_full((tokens, 2), experts - 1) if case == "all to the last expert" else ids


ROUTINGS = ("any", "all to one rank", "all to the last expert", "a rank without tokens")


@dataclass(frozen=True)
class Tokens:
    """What one rank gives to its experts."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    d_out: torch.Tensor


def tokens_of(case: str, rank: int, ranks: int, width: int) -> Tokens:
    draw = torch.Generator().manual_seed(50 + rank)
    ids = routing(case, rank, ranks, 4)
    x, d_out = torch.randn(2, len(ids), width, generator=draw, dtype=torch.float64).bfloat16().double()
    return Tokens(x, ids, torch.rand(ids.shape, generator=draw, dtype=torch.float64).float().double(), d_out)


def forward_and_backward(experts: Experts, tokens: Tokens, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output and gradients; weights of experts in float32 beside bfloat16, as the router gives them."""
    weights_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    x, weights = tokens.x.to(dtype, copy=True), tokens.weights.to(weights_dtype, copy=True)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    out = experts(x, tokens.ids, weights)
    out.backward(tokens.d_out.to(dtype))
    found = {"out": out.detach(), "x": x.grad, "weights": weights.grad}
    found |= {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in experts.named_parameters()
    }
    return found  # type: ignore[return-value]


def experts_alone(case: str, ranks: int, dtype: torch.dtype = torch.float64) -> dict[str, tuple[float, float]]:
    """Experts without FSDP on `ranks` neighbours, against one process that has all tokens: {tensor: (error, allowed)}.

    In bfloat16 the error may be twice what one process makes.
    """
    rank = dist.get_rank()
    config = small(experts=4, active_experts=2, mlp_bias=True)
    torch.manual_seed(0)
    values = {name: torch.randn(p.shape).bfloat16() for name, p in Experts(config).named_parameters()}
    parts = [tokens_of(case, r, ranks, config.width) for r in range(ranks)]
    everything = Tokens(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Tokens)))

    def experts(dtype: torch.dtype) -> Experts:
        made = Experts(config).to(dtype)
        made.load_state_dict(values)
        return made

    exact = forward_and_backward(experts(torch.float64), everything, torch.float64)
    alone = forward_and_backward(experts(dtype), everything, dtype)
    shared = experts(dtype)
    distribute_experts(shared, expert_mesh("cpu", Grid(ranks, expert=ranks)))
    got = forward_and_backward(shared, parts[rank], dtype)
    first = sum(len(part.x) for part in parts[:rank])
    found = {}
    for name, value in got.items():
        mine = slice(first, first + len(parts[rank].x)) if name in ("out", "x", "weights") else slice(None)
        scale = float(exact[name].abs().max())
        rounding = float((alone[name].double() - exact[name]).abs().max())
        error = float((value.double() - exact[name][mine]).abs().max()) if value.numel() else 0.0
        found[name] = (error, 2 * rounding if dtype == torch.bfloat16 else 1e-12 * scale)
    return found


def compiled(layout: Layout, world: World, folder: Path) -> tuple[list[list[float]], int]:
    """Two steps with compiled and recomputed blocks, and the graphs that made. Not Inductor: its compiler takes a minute."""
    compute = ComputeConfig(compile=True, activation_checkpointing="block")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        run = Run(replace(layout, compute=compute), world, folder / "compiled")
        return run.steps(0, 2), torch._dynamo.utils.counters["stats"]["unique_graphs"]


def work(layouts: list[Layout], loads: list[tuple[str, Layout]], world: World, folder: Path) -> dict[str, Any]:
    """Everything that one number of ranks computes."""
    found: dict[str, Any] = {"gradients": {}, "runs": {}, "resumed": {}, "experts": {}}
    for layout in layouts:
        found["gradients"][layout.name] = gradients(layout, world)
        found["runs"][layout.name] = whole_run(layout, world, folder)
    for source, layout in loads:
        found["resumed"][f"{source} -> {layout.name}"] = resumed(source, layout, world, folder)
    return found


def start_rank(rank: int, ranks: int, layouts: list[Layout], loads: list[tuple[str, Layout]], folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    world = distributed.start("cpu", threads=1)
    found = work(layouts, loads, world, folder)
    for case in ROUTINGS:
        found["experts"][case] = experts_alone(case, ranks)
    found["experts"]["bfloat16"] = experts_alone("any", ranks, torch.bfloat16)
    if ranks == 2:
        found["compiled"] = compiled(layouts[0], world, folder)
    again, first = gradients(layouts[0], world), found["gradients"][layouts[0].name]
    found["same bits"] = all(torch.equal(again[name], first[name]) for name in first)
    torch.save(found, folder / f"found-{ranks}-{rank}.pt")
    distributed.stop()
