"""The beginning of a run: data opened, sizes checked, and what is about to happen said aloud and written down."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from grist_data import Batches, Shards, Tokenizer
from grist_data.manifest import read_manifest
from grist_data.prepare import prepare
from grist_kernels import backend
from grist_model import accounting
from grist_train.checkpoint import write_json
from grist_train.config import TrainConfig, to_dict
from grist_train.distributed import World, barrier, compute_dtype
from grist_train.metrics import Metrics, environment


def open_data(config: TrainConfig, world: World) -> tuple[Tokenizer, Shards, Shards | None]:
    """The dataset of a run: tokenizer, training split, validation split (None when the dataset has none).

    The first rank prepares the dataset if it is not there yet; the others wait.

    Raises:
        ValueError: The tokenizer has more ids than the model has rows, or the best checkpoint is wanted and nothing is held out
            to tell which that is.
    """
    directory = Path(config.data.directory)
    if config.data.prepare is not None and world.is_main:
        prepare(dataclasses.replace(config.data.prepare, out=str(directory)))
    barrier(world)
    train = Shards.open(directory, "train", verify=config.data.verify)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size:,} ids, but model.vocab_size is "
            f"{config.model.vocab_size:,}: set --model.vocab_size to at least {tokenizer.vocab_size}"
        )
    has_val = "val" in read_manifest(directory)["splits"]
    held_out = Shards.open(directory, "val", verify=config.data.verify) if has_val else None
    if held_out is None:
        if config.checkpoint.portable == "best":
            raise ValueError(
                f"checkpoint.portable=best needs a validation split, which {directory} does not have: prepare it with "
                "val_fraction above 0, or use --checkpoint.portable last"
            )
        if world.is_main:
            print(f"{directory} has no validation split: nothing will be evaluated", file=sys.stderr)
    return tokenizer, train, held_out


def check_batch(config: TrainConfig, world: World) -> int:
    """Micro-batch size of a rank. Raises ValueError when the global batch cannot be dealt out evenly."""
    total = config.batch.global_size
    if total % world.size:
        raise ValueError(
            f"batch.global_size {total} cannot be dealt out to {world.size} ranks evenly: make it a multiple of "
            f"{world.size}, or use another number of ranks"
        )
    share = total // world.size
    micro = min(config.batch.micro_size or share, share)
    if share % micro:
        raise ValueError(
            f"each of {world.size} ranks has {share} sequences a step, which micro-batches of {micro} do not fill: "
            f"make batch.micro_size a divisor of {share}"
        )
    return micro


def announce(config: TrainConfig, world: World, model: nn.Module, step: int) -> None:
    """Write `config.yaml` and `environment.json`, and say what runs where."""
    if not world.is_main:
        return
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    write_json(config.run_dir / "environment.json", environment(config, world))
    total, active = accounting.parameters(config.model), accounting.active_parameters(config.model)
    chosen = backend.describe(world.device.type)
    kernels = ", ".join(f"{op}: {how}" for op, how in chosen.items())
    ranks = config.compute.expert_parallel
    layout = f", {config.model.experts // ranks} of {config.model.experts} experts on each" if ranks > 1 else ""
    print(
        f"{config.name}: {total:,} parameters, {active:,} active a token; {world.size} x {world.device.type}{layout}, "
        f"{str(compute_dtype(config.compute, world.device)).removeprefix('torch.')}\n"
        f"kernels: {kernels}\n"
        + (f"resuming at step {step} of {config.steps}" if step else f"{config.steps} steps into {config.run_dir}"),
        file=sys.stderr,
    )


def resumable(batches: Batches, metrics: Metrics, held_out_loss: float | None, config: TrainConfig) -> dict[str, Any]:
    """`state.json` of a checkpoint: everything that is not a tensor."""
    return {
        "batches": batches.state_dict(),
        "seconds": metrics.seconds,
        "validation_loss": held_out_loss,
        "config": to_dict(config),
    }
