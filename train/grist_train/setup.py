"""The beginning of a run: what is about to happen said aloud and written down; and what a checkpoint remembers of it."""

from __future__ import annotations

import sys
from typing import Any

import yaml
from torch import nn

from grist_kernels import backend
from grist_model import accounting
from grist_train.bad_steps import BadSteps
from grist_train.checkpoint import write_json
from grist_train.config import TrainConfig, to_dict
from grist_train.distributed import World, compute_dtype
from grist_train.initial import fingerprint
from grist_train.mesh import describe
from grist_train.metrics import Metrics, environment
from grist_train.step_guard import StepGuard
from grist_train.tasks import NextToken, Preference


def announce(config: TrainConfig, world: World, model: nn.Module, step: int) -> None:
    """Write `config.yaml` and `environment.json`, and say what runs where."""
    if not world.is_main:
        return
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    write_json(config.run_dir / "environment.json", environment(config, world))
    total, active = accounting.parameters(config.model), accounting.active_parameters(config.model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    adapters = f"; training {trained:,} in adapters" if config.lora is not None else ""
    chosen = backend.describe(world.device.type)
    kernels = ", ".join(f"{op}: {how}" for op, how in chosen.items())
    layout = describe(config.model, config.compute)
    print(
        f"{config.name}: {total:,} parameters, {active:,} active a token{adapters}; {world.size} x "
        f"{world.device.type}{layout}, {str(compute_dtype(config.compute, world.device)).removeprefix('torch.')}\n"
        f"kernels: {kernels}\n"
        + (f"resuming at step {step} of {config.steps}" if step else f"{config.steps} steps into {config.run_dir}"),
        file=sys.stderr,
    )


def resumable(
    step: int,
    task: NextToken | Preference,
    metrics: Metrics,
    guard: StepGuard,
    bad: BadSteps,
    held_out_loss: float | None,
    config: TrainConfig,
) -> dict[str, Any]:
    """`state.json` of a checkpoint: everything that is not a tensor."""
    return {
        **task.position(step),
        **guard.state_dict(),
        **bad.state_dict(),
        "tokens": metrics.tokens,
        "seconds": metrics.seconds,
        "validation_loss": held_out_loss,
        "initial_xxh3": fingerprint(config),
        "config": to_dict(config),
    }
