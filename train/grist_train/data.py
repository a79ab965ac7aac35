"""The data of a run: datasets prepared or opened, and batches dealt out to the ranks."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grist_data import Batches, Shards, Tokenizer
from grist_data.manifest import DATASET_FILE, read_manifest
from grist_data.mixture import Mixture, Stage
from grist_data.prepare import PrepareConfig, prepare
from grist_train.config import TrainConfig
from grist_train.data_config import Phase
from grist_train.distributed import World, barrier


@dataclass(frozen=True)
class Data:
    """tokenizer: of all sources. train: the training split of each. held_out: the validation split of those that have one."""

    tokenizer: Tokenizer
    train: dict[str, Shards]
    held_out: dict[str, Shards]


def open_data(config: TrainConfig, world: World) -> Data:
    """Open the datasets of a run. The first rank prepares those that are not there yet; the others wait.

    Raises:
        ValueError: The tokenizer has more ids than the model has rows, or the best checkpoint is wanted and nothing is held out
            to tell which that is.
    """
    sources = config.data.all_sources()
    if world.is_main:
        for source in sources.values():
            if source.prepare is not None:
                _prepare(dataclasses.replace(source.prepare, out=source.directory))
    barrier(world)
    directories = {name: Path(source.directory) for name, source in sources.items()}
    first = next(iter(directories.values()))
    tokenizer = Tokenizer.load(first)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer in {first} has {tokenizer.vocab_size:,} ids, but model.vocab_size is "
            f"{config.model.vocab_size:,}: set --model.vocab_size to at least {tokenizer.vocab_size}"
        )
    verify = config.data.verify
    train = {name: Shards.open(directory, "train", verify=verify) for name, directory in directories.items()}
    held_out = {
        name: Shards.open(directory, "val", verify=verify)
        for name, directory in directories.items()
        if "val" in read_manifest(directory)["splits"]
    }
    if not held_out:
        where = ", ".join(map(str, directories.values()))
        if config.checkpoint.portable == "best":
            raise ValueError(
                f"checkpoint.portable=best needs a validation split, which {where} does not have: prepare it with "
                "val_fraction above 0, or use --checkpoint.portable last"
            )
        if world.is_main:
            print(f"{where} has no validation split: nothing will be evaluated", file=sys.stderr)
    return Data(tokenizer, train, held_out)


def _prepare(config: PrepareConfig) -> None:
    try:
        prepare(config)
    except ValueError as error:
        if not (Path(config.out) / DATASET_FILE).is_file():
            raise
        raise ValueError(f"{error}; or, to train on what is there, say so with --data.prepare null") from error


def check_batch(phase: Phase, world: World) -> int:
    """Micro-batch size of a rank. Raises ValueError when the global batch cannot be dealt out evenly."""
    total = phase.global_size
    where = f" (after step {phase.after_step})" if phase.after_step else ""
    if total % world.data_size:
        raise ValueError(
            f"batch.global_size {total}{where} cannot be dealt out to {world.data_size} ranks evenly: make it a multiple of "
            f"{world.data_size}, or use another number of ranks"
        )
    share = total // world.data_size
    micro = min(phase.micro_size or share, share)
    if share % micro:
        raise ValueError(
            f"each of {world.data_size} ranks has {share} sequences a step{where}, which micro-batches of {micro} do not fill: "
            f"make batch.micro_size a divisor of {share}"
        )
    return micro


def open_batches(
    config: TrainConfig, world: World, data: Data, starts: list[int], state: dict[str, Any] | None
) -> Batches:
    """Batches of a run from its beginning, or from where `state`, the state.json of a checkpoint, left them.

    starts: as stage_starts gives them.

    Raises:
        ValueError: Sizes that do not divide; a state of other data, or of other stages than those that have begun.
    """
    beginning, *stages = config.phases
    mixture = Mixture(
        data.train,
        beginning.weights,
        tuple(
            Stage(start, phase.weights, phase.sequence_length, phase.global_size, check_batch(phase, world))
            for start, phase in zip(starts, stages, strict=True)
        ),
        config.data.unit_tokens,
    )
    batches = Batches(
        mixture,
        beginning.sequence_length,
        beginning.global_size,
        seed=config.seed,
        rank=world.data_rank,
        world_size=world.data_size,
        micro_batch_size=check_batch(beginning, world),
        device=world.device,
        documents=config.data.document_masks,
        packing=config.data.packing,
    )
    if state is not None:
        batches.load_state_dict(state["batches"])
    return batches


def stage_starts(phases: tuple[Phase, ...], state: dict[str, Any] | None) -> list[int]:
    """Position in samples at which each phase after the first begins.

    A run that goes on, perhaps with another batch size, keeps the positions of the stages that have begun; later ones are
    counted from where it stands.
    """
    begun = [] if state is None else state["stages"]
    step, position = (0, 0) if state is None else (state["step"], state["batches"]["pos"])
    past = [phase.after_step for phase in phases[1:] if phase.after_step < step]
    if past != [after_step for after_step, _ in begun]:
        raise ValueError(
            f"by step {step} this run had begun stages after the steps {[after_step for after_step, _ in begun]}, but "
            f"data.stages now has {past} until there: what is behind a run may not change; use another --name"
        )
    starts = [start for _, start in begun]
    size = phases[len(begun)].global_size
    for phase in phases[1 + len(begun) :]:
        position += (phase.after_step - step) * size
        step, size = phase.after_step, phase.global_size
        starts.append(position)
    return starts


def stages_begun(config: TrainConfig, step: int, starts: list[int]) -> list[tuple[int, int]]:
    """(after_step, position) of every stage that a step up to `step` belonged to, for `stage_starts`."""
    pairs = zip((phase.after_step for phase in config.phases[1:]), starts, strict=True)
    return [(after_step, start) for after_step, start in pairs if after_step < step]
