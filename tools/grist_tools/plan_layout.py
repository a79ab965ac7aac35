"""How a run is laid out on GPUs: the numbers that decide memory and time, in one place, and whether the trainer can do it."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from grist_train.step_config import EveryBlocks

if TYPE_CHECKING:
    from grist_train.config import TrainConfig

# compute.activation_checkpointing, from the most that is kept to the least.
CHECKPOINTING = ("none", "selective", EveryBlocks(4), EveryBlocks(2), "block")
# A field of Layout, and the setting of ComputeConfig that gives it to the trainer. One that ComputeConfig does not have
# (yet) can only keep its default: `Layout.config` refuses anything else, so nothing is recommended that cannot be run.
SETTINGS = {
    "expert_parallel": "expert_parallel",
    "replicate": "replicate",
    "context_parallel": "context_parallel",
    "reshard_after_forward": "reshard_after_forward",
    "reduce_every_micro_batch": "reduce_every_micro_batch",
    "activation_checkpointing": "activation_checkpointing",
}


@dataclass(frozen=True)
class Layout:
    """One way to run a config.

    Attributes:
        gpus: All of them.
        gpus_per_node: Those of one machine, joined by links; machines are joined by a network.
        micro_size: Sequences a rank puts through the model at once.
        micro_batches: How many times it does in a step.
        expert_parallel: Neighbouring ranks that share the experts.
        replicate: Copies of the sharded model (hybrid sharding); parameters are cut over gpus / replicate ranks.
        context_parallel: Ranks that share a sequence.
        activation_checkpointing: As compute.activation_checkpointing.
    """

    gpus: int
    gpus_per_node: int
    micro_size: int
    micro_batches: int
    expert_parallel: int = 1
    replicate: int = 1
    context_parallel: int = 1
    reshard_after_forward: bool = True
    reduce_every_micro_batch: bool = False
    activation_checkpointing: str | EveryBlocks = "none"

    @property
    def shards(self) -> int:
        """Ranks that one copy of the parameters is cut over."""
        return self.gpus // self.replicate

    def config(self, run: TrainConfig) -> TrainConfig:
        """The run with this layout.

        Raises:
            ValueError: the trainer does not have the setting, or refuses it.
        """
        from grist_train.expert_parallel import check_layout

        there = {field.name for field in dataclasses.fields(run.compute)}
        changes = {}
        for name, setting in SETTINGS.items():
            value = getattr(self, name)
            if setting in there:
                changes[setting] = value
            elif value != _DEFAULTS[name]:
                raise ValueError(f"the trainer has no setting compute.{setting}, so it cannot run {name} {value}")
        compute = replace(run.compute, **changes)
        laid_out = replace(run, compute=compute, batch=replace(run.batch, micro_size=self.micro_size))
        check_layout(laid_out.model, laid_out.compute, self.gpus)
        return laid_out

    def options(self, run: TrainConfig) -> str:
        """What to add to the command line of the run to get this layout; empty where it is the run's own."""
        mine, own = self.config(run), run
        found = [
            f"--compute.{setting}{written(getattr(mine.compute, setting))}"
            for setting in SETTINGS.values()
            if hasattr(own.compute, setting) and getattr(mine.compute, setting) != getattr(own.compute, setting)
        ]
        if mine.batch.micro_size != own.batch.micro_size:
            found.append(f"--batch.micro_size {mine.batch.micro_size}")
        return " ".join(found)


def written(value: object) -> str:
    """What follows the name of a setting on the trainer's command line."""
    return f".every {value.every}" if isinstance(value, EveryBlocks) else f" {value}".lower()


# More sequences a micro-batch than this are not tried: one rank's kernels are long busy by then.
LARGEST_MICRO_SIZE = 64
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Layout)}


def micro_batch(run: TrainConfig, gpus: int) -> tuple[int, int]:
    """Sequences in a micro-batch and micro-batches a step on each GPU; GPUs that share sequences count as one.

    Raises:
        ValueError: the global batch cannot be dealt out evenly.
    """
    total, readers = run.batch.global_size, gpus // run.compute.context_parallel
    if readers < 1 or total % readers:
        raise ValueError(
            f"batch.global_size {total} cannot be dealt out to {readers} GPUs evenly (those that share sequences "
            "count as one): change one of them, or compute.context_parallel"
        )
    share = total // readers
    micro = min(run.batch.micro_size or share, share)
    if share % micro:
        raise ValueError(f"{share} sequences a GPU and step are not filled by micro-batches of {micro}")
    return micro, share // micro


def layout_of(run: TrainConfig, gpus: int, gpus_per_node: int) -> Layout:
    """The layout that a run file asks for.

    Raises:
        ValueError: the batch or the experts do not fit so many GPUs.
    """
    micro, micro_batches = micro_batch(run, gpus)
    own = {name: getattr(run.compute, setting) for name, setting in SETTINGS.items() if hasattr(run.compute, setting)}
    layout = Layout(gpus, gpus_per_node, micro, micro_batches, **own)
    layout.config(run)
    return layout


def layouts(run: TrainConfig, own: Layout) -> list[Layout]:
    """The ways to run it on these GPUs that the trainer can do: copies cut over 1, 8 and 64 machines, or over all; sequences
    shared only where one is a micro-batch already, since sharing them saves nothing but memory."""
    experts = [p for p in _powers(own.gpus_per_node) if run.model.experts % p == 0] if run.model.experts else []
    copies = {own.gpus // shards for k in range(3) if own.gpus % (shards := own.gpus_per_node * 8**k) == 0}
    tried = {
        replace(
            own,
            micro_size=size,
            micro_batches=number,
            expert_parallel=expert_parallel,
            replicate=replicate,
            context_parallel=context_parallel,
            activation_checkpointing=checkpointing,
            reshard_after_forward=reshard,
            reduce_every_micro_batch=every and number > 1,
        )
        for (
            size,
            number,
            context_parallel,
        ), expert_parallel, replicate, checkpointing, reshard, every in itertools.product(
            _dealt(run, own),
            {1, *experts, own.expert_parallel},
            {1, *copies, own.replicate} - {0},
            {*CHECKPOINTING, own.activation_checkpointing},
            (True, False),
            (True, False),
        )
    }
    return [layout for layout in tried if can_run(run, layout)]


def _dealt(run: TrainConfig, own: Layout) -> list[tuple[int, int, int]]:
    """Sequences in a micro-batch, micro-batches a step, ranks that share a sequence."""
    found = []
    for context_parallel in {*_powers(own.gpus_per_node), own.context_parallel}:
        readers = own.gpus // context_parallel
        if own.gpus % context_parallel or run.batch.global_size % readers:
            continue
        share = run.batch.global_size // readers
        sizes = [1] if context_parallel > 1 else _powers(min(share, LARGEST_MICRO_SIZE))
        if context_parallel == own.context_parallel:
            sizes = {*_powers(min(share, LARGEST_MICRO_SIZE)), own.micro_size}
        found += [(size, share // size, context_parallel) for size in sizes if share % size == 0]
    return found


def can_run(run: TrainConfig, layout: Layout) -> bool:
    """Whether the trainer takes it: by asking the trainer."""
    try:
        layout.config(run)
    except ValueError:
        return False
    return True


def _powers(limit: int) -> list[int]:
    return [2**k for k in range(limit.bit_length()) if 2**k <= limit]
