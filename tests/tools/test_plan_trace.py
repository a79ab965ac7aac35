"""Traced memory: what a real step on a CPU is measured to take, what PyTorch's own tracker says, and what the formulas say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from measured_step import measured_peak, on_gloo
from torch.multiprocessing.spawn import spawn

import grist_model
from grist_kernels import backend, launch
from grist_kernels.launch import Target
from grist_model.config import ModelConfig
from grist_tools import plan_roles as roles
from grist_tools import plan_trace
from grist_tools.memory import counted, estimate, saved_bytes_per_token
from grist_tools.plan_gpus import GPUS
from grist_tools.plan_layout import Layout
from grist_tools.plan_ledger import Ledger
from grist_tools.plan_links import Assumptions
from grist_tools.plan_pretend import pretending, world_of
from grist_tools.plan_time import _Work, ring_visits
from grist_tools.plan_trace import trace
from grist_train import distributed, optimizer
from grist_train.config import BatchConfig, ComputeConfig, DataConfig, EveryBlocks, OptimizerConfig, TrainConfig
from grist_train.distributed import World

SHAPE: dict[str, Any] = {"vocab_size": 640, "context_length": 128, "layers": 2, "width": 64, "heads": 4, "kv_heads": 2}
SHAPE["window"] = 16
DENSE = ModelConfig(**SHAPE, experts=0, expert_width=192)
SPARSE = ModelConfig(**SHAPE, experts=8, active_experts=2, expert_width=64)
H100 = Target("sm_90", 132)
MIB = 2**20


def run(
    model: ModelConfig = SPARSE, optimizer: str = "adamw", micro: int = 2, length: int = 64, **compute
) -> TrainConfig:
    return TrainConfig(
        model=model,
        data=DataConfig(sequence_length=length),
        batch=BatchConfig(global_size=64, micro_size=micro),
        optimizer=OptimizerConfig(name=optimizer),  # type: ignore[arg-type]
        compute=ComputeConfig(**{"dtype": "float32", **compute}),
    )


MEASURED = {
    "dense": (run(DENSE), 1),
    "dense, three micro-batches": (run(DENSE), 3),
    "experts": (run(), 1),
    "experts, Muon": (run(optimizer="muon"), 2),
    "experts, recomputed": (run(micro=8, activation_checkpointing="block"), 1),
    "dense, recomputed": (run(DENSE, micro=8, activation_checkpointing="block"), 2),
    "dense, half of the blocks recomputed": (run(DENSE, micro=8, activation_checkpointing=EveryBlocks(2)), 1),
    "dense, selective": (run(DENSE, micro=8, activation_checkpointing="selective"), 1),
    "experts, selective": (run(micro=8, activation_checkpointing="selective"), 1),
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_planned_step_takes_what_a_real_one_does(tmp_path, name):
    """To one part in fifty, from the profiler's account of every allocation."""
    config, micro_batches = MEASURED[name]
    alone = World(0, 1, 0, torch.device("cpu"), None, None)  # type: ignore[arg-type]
    measured = measured_peak(config, alone, micro_batches, tmp_path)
    planned = trace(config, 1, config.batch.micro_size or 1, micro_batches, None).peak.total
    assert planned == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("shared", [{}, {"expert_parallel": 2}, {"context_parallel": 2}])
def test_two_ranks_take_what_one_of_them_is_planned_to(tmp_path, shared):
    """To a tenth: gloo's threads let go of their copies when they come to it."""
    config = run(micro=16, **shared)
    spawn(on_gloo, args=(config, 2, 1, tmp_path), nprocs=2)
    measured = int((tmp_path / "peak-0.txt").read_text(encoding="utf-8"))
    planned = trace(config, 2, 16, 1, None).peak.total
    assert planned == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize("config", [run(DENSE, dtype="bfloat16"), run(dtype="bfloat16", reshard_after_forward=False)])
def test_the_tracker_of_pytorch_finds_the_same_peak(monkeypatch, config):
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    found = {}

    def step(config, model, optimizers, ledger, world, *rest):
        # The tracker follows calls of the model; the trainer calls `hidden`.
        model.forward = type(model).hidden.__get__(model)
        model.hidden = model.__call__
        tracker = FSDPMemTracker(model, optimizers[0])
        with tracker:
            original(config, model, optimizers, ledger, world, *rest)
        found["peak"] = sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())

    original = plan_trace._step
    monkeypatch.setattr(plan_trace, "_step", step)
    monkeypatch.setattr(plan_trace, "CUDA_ROUNDING", 1)
    planned = trace(config, 8, 2, 1, H100).peak.total
    assert planned == pytest.approx(found["peak"], rel=0.02)


def test_every_byte_has_a_role(monkeypatch):
    monkeypatch.setattr(plan_trace, "CUDA_ROUNDING", 1)
    config = run(dtype="bfloat16")
    peak = trace(config, 8, 2, 1, H100).peak
    held = counted(config.model, 8, 1).held
    assert peak.roles[roles.PARAMETERS] == pytest.approx(4 * held, rel=0.01)  # and buffers
    assert peak.roles[roles.OPTIMIZER] == pytest.approx(8 * held, rel=0.01)
    assert peak.roles[roles.DATA] == 2 * 2 * 64 * 8
    assert peak.total == sum(peak.roles.values())
    assert set(peak.roles) <= set(roles.ROLES)


def test_gradients_that_wait_between_micro_batches_are_whole():
    config = run(dtype="bfloat16")
    total = sum(p.numel() for p in grist_model.build(config.model, device="meta").parameters())
    waiting = trace(config, 8, 2, 4, H100).peak.roles[roles.GRADIENTS]
    reduced = trace(run(dtype="bfloat16", reduce_every_micro_batch=True), 8, 2, 4, H100).peak.roles[roles.GRADIENTS]
    assert waiting == pytest.approx(4 * total, rel=0.05)
    assert reduced < waiting / 2


def test_recomputation_keeps_less():
    kept = trace(run(DENSE, dtype="bfloat16", micro=16), 8, 16, 1, H100).peak.total
    again = run(DENSE, dtype="bfloat16", micro=16, activation_checkpointing="block")
    assert trace(again, 8, 16, 1, H100).peak.total < kept


@pytest.mark.parametrize(("ranks", "expert_parallel"), [(8, 1), (8, 2), (8, 8), (32, 1), (128, 1)])
def test_ranks_exchange_what_the_model_of_time_counts(ranks, expert_parallel):
    config = run(dtype="bfloat16", expert_parallel=expert_parallel)
    traffic = trace(config, ranks, 2, 1, H100).traffic
    layout = Layout(ranks, 8, 2, 4, expert_parallel=expert_parallel)
    work = _Work(config, layout, GPUS["h100"], Assumptions())
    layers = config.model.layers
    blocks = layers * (work.counts.dense + (work.counts.experts if expert_parallel < ranks else 0))
    gathered = sum(size for (kind, _), size in traffic.size.items() if kind == "all-gather")
    reduced = sum(size for (kind, _), size in traffic.size.items() if kind == "reduce-scatter")
    assert gathered == 2 * (2 * blocks + work.counts.root)
    assert reduced == 4 * (blocks + work.counts.root)
    rows = 2 * 64 * config.model.active_experts
    sent = traffic.size.get(("all-to-all", expert_parallel), 0)
    # Rows there and back, and their gradients; their weights and how many they are, a little more.
    assert sent == pytest.approx(4 * layers * rows * config.model.width * 2 if expert_parallel > 1 else 0, rel=0.1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sequences_go_around_as_often_as_the_model_of_time_counts(ranks):
    """Keys and values in both directions, and their gradients in float32; a window of 16 ends the ring after one neighbour."""
    config = run(dtype="bfloat16", context_parallel=ranks, length=128)
    traffic = trace(config, 8, 2, 1, H100).traffic
    model = config.model
    values = 2 * 128 // ranks * 2 * model.kv_heads * model.attention_head_width
    visits = [ring_visits(128, ranks, model.layer_window(layer)) for layer in range(model.layers)]
    assert sorted(visits) == [min(3, ranks), ranks]
    assert traffic.size["send", ranks] == sum(2 * (each - 1) * 2 * values + each * 4 * values for each in visits)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "muon"},
        {"reshard_after_forward": False},
        {"reduce_every_micro_batch": True},
        {"expert_parallel": 4},
        {"expert_parallel": 2, "replicate": 2},
        {"replicate": 4},
        {"model": DENSE},
        {"model": DENSE, "activation_checkpointing": "block"},
        {"activation_checkpointing": "selective"},
        {"model": DENSE, "activation_checkpointing": "selective"},
        {"activation_checkpointing": EveryBlocks(2)},
        {"model": DENSE, "activation_checkpointing": EveryBlocks(4)},
        {"context_parallel": 2},
        {"context_parallel": 4, "model": DENSE, "activation_checkpointing": "block"},
        {"context_parallel": 2, "expert_parallel": 2, "activation_checkpointing": "selective"},
        {"model": replace(SPARSE, experts=6)},
    ],
)
def test_the_formula_is_near_the_trace(changes):
    shape = {"layers": 4, "width": 256, "heads": 8, "vocab_size": 8192, "expert_width": 512}
    model = replace(changes.get("model", SPARSE), **shape)
    config = run(**{"micro": 8, "length": 128, "dtype": "bfloat16", **changes, "model": model})
    compute = {name: value for name, value in changes.items() if name not in ("optimizer", "model")}
    for micro_batches in (1, 3):
        traced = trace(config, 8, 8, micro_batches, H100).peak.total
        formula = estimate(config, Layout(8, 8, 8, micro_batches, **compute)).used_bytes
        assert formula == pytest.approx(traced, rel=0.15), micro_batches


@pytest.mark.parametrize(
    "changes", [{}, {"experts": 0}, {"shared_expert_width": 48}, {"heads": 8, "kv_heads": 1, "head_width": 16}]
)
def test_activations_by_formula_are_what_autograd_keeps(changes):
    config = replace(SPARSE, **{"expert_width": 96, **changes})
    model = grist_model.build(config)
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        outputs = model.hidden(torch.randint(640, (8, 64)), return_router=True)
    estimated = config.layers * 8 * 64 * saved_bytes_per_token(config, 4)
    assert estimated == pytest.approx(sum(kept.values()), rel=0.15)
    del outputs


@pytest.mark.parametrize(("ranks", "cut"), [(64, 64), (256, 64)])
def test_more_ranks_than_experts_gather_no_more_than_there_is(ranks, cut):
    """8 experts, 64 wide, are cut into rows; over more than 64 ranks by as many copies of them."""
    config = run(dtype="bfloat16")
    layout = Layout(ranks, 8, 2, 1)
    counts = counted(config.model, ranks, 1)
    assert counts.expert_ranks == cut
    assert counts.experts == counted(config.model, 8, 1).experts
    traced = trace(config, ranks, 2, 1, H100).peak
    assert estimate(config, layout).used_bytes == pytest.approx(traced.total, rel=0.15)


def test_tracing_leaves_nothing_behind():
    before = backend.mode(), launch.run, backend._check_can_run, torch.UntypedStorage.resize_
    trace(run(), 4, 2, 1, H100)
    assert (backend.mode(), launch.run, backend._check_can_run, torch.UntypedStorage.resize_) == before
    assert not dist.is_initialized()
    assert not torch.empty(1).is_cuda


def test_a_process_that_is_in_a_group_already_is_told(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="already in one"):
            trace(run(), 4, 2, 1, None)
    finally:
        dist.destroy_process_group()


def test_a_ledger_counts_what_lives():
    with pretending(None):
        ledger = Ledger(rounding=512)
        with ledger:
            kept = torch.empty(1000, dtype=torch.uint8)
            with ledger.during("backward", roles.LOSS):
                gone = torch.empty(3 * MIB, dtype=torch.uint8)
                view = gone[:10]
            del gone
            view.add_(1)
            del view
            later = torch.empty(MIB, dtype=torch.uint8)
        peak = ledger.peak()
    assert peak.roles == {roles.ACTIVATIONS: 1024, roles.LOSS: 3 * MIB}
    assert peak.phase == "backward"
    assert kept.nbytes + later.nbytes == MIB + 1000


def test_the_world_that_is_played_has_its_size():
    with world_of(64) as world:
        assert (world.size, dist.get_world_size()) == (64, 64)
        model = grist_model.build(DENSE, device="meta")
        distributed.shard(model, world, ComputeConfig(dtype="bfloat16"))
        assert len(optimizer.roles(model).matrices) == 2 * 6
