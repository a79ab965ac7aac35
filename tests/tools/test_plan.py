"""The planner: memory by category, the answer, and knobs that really help."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_house import config as tiny_config

import grist_model
from grist_tools.console import count
from grist_tools.memory import estimate, saved_bytes_per_token
from grist_tools.plan import GPUS, duration, heaviest, knobs, main, micro_batch, speed_table
from grist_train.config import TrainConfig, load
from grist_train.data_config import StageConfig

RUNS = Path(__file__).parents[2] / "train" / "runs"
GIB = 2**30


def run(name: str, **overrides) -> TrainConfig:
    return load(RUNS / f"{name}.yaml", **overrides)


def with_compute(config: TrainConfig, **changes) -> TrainConfig:
    return replace(config, compute=replace(config.compute, **changes))


def test_parameters_gradients_and_optimizer_are_what_float32_and_sharding_make_of_them():
    config = run("moe_1b", **{"optimizer.name": "adamw"})
    total = sum(p.numel() for p in grist_model.build(config.model, device="meta").parameters())
    memory = estimate(config, 8, 1, 1)
    assert memory.parameters == 4 * total / 8
    assert memory.optimizer == 8 * total / 8
    assert memory.gradients > 4 * total / 8
    assert memory.optimizer_step == 0


def test_muon_keeps_one_value_for_a_matrix_and_adam_two():
    adam = estimate(run("moe_1b", **{"optimizer.name": "adamw"}), 8, 1, 1)
    muon = estimate(run("moe_1b", **{"optimizer.name": "muon"}), 8, 1, 1)
    assert adam.optimizer / 2 < muon.optimizer < adam.optimizer
    assert muon.optimizer_step > 0


def test_one_float32_process_is_not_sharded():
    memory = estimate(with_compute(run("quickstart"), dtype="float32"), 1, 1, 1)
    assert memory.gathered == 0
    assert memory.gradients == memory.parameters


def test_gradients_that_wait_between_micro_batches_are_whole():
    config = with_compute(run("moe_1b"), reduce_every_micro_batch=False)
    one, several = estimate(config, 8, 1, 1), estimate(config, 8, 1, 4)
    assert several.gradients - one.gradients == pytest.approx(8 * one.parameters)
    assert estimate(with_compute(config, reduce_every_micro_batch=True), 8, 1, 4).gradients == one.gradients


def test_checkpointing_and_smaller_micro_batches_need_less():
    config = with_compute(run("moe_1b"), activation_checkpointing="none")
    memory = estimate(config, 8, 4, 1)
    assert (
        estimate(with_compute(config, activation_checkpointing="block"), 8, 4, 1).activations < memory.activations / 4
    )
    assert estimate(config, 8, 2, 1).activations == memory.activations / 2
    assert estimate(with_compute(config, reshard_after_forward=False), 8, 4, 1).gathered > memory.gathered


def test_the_peak_is_the_worse_of_backward_and_optimizer_step():
    memory = estimate(run("moe_1b"), 8, 1, 1)
    parts = memory.parameters + memory.gradients + memory.optimizer
    transient = max(memory.gathered + memory.activations + memory.loss, memory.optimizer_step)
    assert memory.peak_bytes == pytest.approx(1.05 * (parts + transient) + 1.5 * GIB)
    assert set(memory.categories()) > {"parameters", "gradients", "optimizer state", "activations"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts": 0},
        {"shared_expert_width": 48},
        {"experts": 8, "active_experts": 3, "expert_width": 64},
        {"width": 96, "heads": 8, "kv_heads": 1, "head_width": 16},
    ],
)
def test_activations_are_near_what_autograd_keeps(changes):
    """Measured on the CPU's fused ops; the estimate may be above (it counts sorted rows), hardly below."""
    config = tiny_config(**{"width": 64, "expert_width": 96, **changes})
    model = grist_model.build(config)
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        outputs = model.hidden(torch.randint(320, (8, 64)), return_router=True)
    measured = sum(kept.values())
    estimated = config.layers * 8 * 64 * saved_bytes_per_token(config, 4)
    assert 0.9 * measured < estimated < 1.8 * measured
    del outputs


def test_dealing_out_the_batch():
    config = replace(run("moe_1b"), batch=replace(run("moe_1b").batch, global_size=64, micro_size=4))
    assert micro_batch(config, 8) == (4, 2)
    assert micro_batch(config, 32) == (2, 1)
    with pytest.raises(ValueError, match="64 cannot be dealt out to 7 GPUs"):
        micro_batch(config, 7)
    with pytest.raises(ValueError, match="not filled by micro-batches of 4"):
        micro_batch(replace(config, batch=replace(config.batch, global_size=48)), 8)


def test_every_knob_that_is_named_makes_the_run_fit():
    config = with_compute(run("moe_1b"), activation_checkpointing="none", reduce_every_micro_batch=False)
    config = replace(config, batch=replace(config.batch, global_size=64, micro_size=8))
    capacity = 0.7 * estimate(config, 8, *micro_batch(config, 8)).peak_bytes
    found = knobs(config, 8, capacity)
    assert any("--compute.activation_checkpointing block" in line for line in found)
    assert all("GiB" in line for line in found)
    assert knobs(config, 8, 1 * GIB) == []


def test_a_run_that_fits(capsys):
    status = main(["--config", str(RUNS / "quickstart.yaml"), "--gpus", "1", "--gpu", "h200"])
    out = capsys.readouterr().out
    assert status == 0
    assert "fits: " in out
    assert "assumed utilisation" in out


def test_a_run_that_does_not_fit_says_what_would_help(capsys):
    status = main(["--config", str(RUNS / "gpt_oss_20b.yaml"), "--gpus", "4", "--gpu", "h100"])
    out = capsys.readouterr().out
    assert status == 1
    assert "does not fit: " in out
    assert "GPUs  ->  " in out


def test_settings_of_the_run_may_follow(capsys):
    arguments = ["--config", str(RUNS / "quickstart.yaml"), "--gpus", "1", "--gpu", "h100", "--steps", "123"]
    assert main(arguments) == 0
    assert "123 steps" in capsys.readouterr().out


@pytest.mark.parametrize("extra", [["--mfu", "1.5"], ["--gpus", "7", "--batch.global_size", "16"], ["--stepz", "3"]])
def test_bad_input_is_told(capsys, extra):
    arguments = ["--config", str(RUNS / "quickstart.yaml"), "--gpus", "1", "--gpu", "h100", *extra]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("plan: ")


def test_every_gpu_has_a_known_peak():
    from grist_train.metrics import PEAK_FLOPS

    assert {device for device, _ in GPUS.values()} <= set(PEAK_FLOPS)


@pytest.mark.parametrize(
    ("seconds", "text"), [(40, "40 s"), (600, "10 minutes"), (7200, "2.0 hours"), (8 * 86400, "8.0 days")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_stages_count_with_their_own_sizes():
    stages = (StageConfig(100, sequence_length=4096, global_size=64), StageConfig(150, global_size=32))
    config = run("moe_1b", **{"steps": 200, "data.sequence_length": 2048, "batch.global_size": 128})
    config = replace(config, data=replace(config.data, stages=stages), model=replace(config.model, context_length=4096))
    tokens = 100 * 128 * 2048 + 50 * 64 * 4096 + 50 * 32 * 4096
    assert f"200 steps, {count(tokens)} tokens" in speed_table(config, 8, 1e15, 0.5)
    assert heaviest(config, 8).data.sequence_length == 4096
