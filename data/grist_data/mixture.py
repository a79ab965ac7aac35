"""What a run reads: several datasets by weight, and how weights, sequence length and batch size change along the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grist_data.deal import MAX_PERIOD, exact_counts
from grist_data.shards import Shards


@dataclass(frozen=True)
class Stage:
    """A change from a position on; what is None stays as it was.

    start: position, in samples since the beginning of the run. weights: name of a source -> its share of the samples, positive;
    sources that are left out are not drawn. sequence_length: tokens. global_batch_size: samples of a step; a step keeps that
    of the stage in which it begins. micro_batch_size: of this rank, no part of the order.
    """

    start: int
    weights: Mapping[str, float] | None = None
    sequence_length: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None


@dataclass(frozen=True)
class Setting:
    """What holds from position `start` on: a stage with nothing left open. micro_batch_size None: the rank's share."""

    start: int
    weights: Mapping[str, float]
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int | None


@dataclass(frozen=True)
class Mixture:
    """Datasets that are read together, each in epochs of its own, so that none repeats before it is used up.

    sources: name -> a split of a dataset; all made with one tokenizer. The names are for weights and messages, the order does
    not depend on them. weights: shares at the beginning. stages: later changes, in the order of their start. Adding one beyond
    the position that a run has reached leaves everything before it as it was; so does changing or removing one there.
    unit_tokens: what is shuffled, a multiple of every sequence_length; by default the longest of them. To be free to go on with
    longer sequences one day, set it to those at the beginning.
    Raises ValueError for weights and stages that make no sense, and for datasets of different tokenizers.
    """

    sources: Mapping[str, Shards]
    weights: Mapping[str, float]
    stages: tuple[Stage, ...] = ()
    unit_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_sources(self.sources)
        starts = [0, *(stage.start for stage in self.stages)]
        for number, stage in enumerate(self.stages, 1):
            if stage.start <= starts[number - 1]:
                raise ValueError(
                    f"stages must begin at rising positions above 0, but stage {number} begins at {stage.start:,} and the one"
                    f" before it at {starts[number - 1]:,}"
                )
        named = [self.weights, *(stage.weights for stage in self.stages if stage.weights is not None)]
        for weights in named:
            _check_weights(weights, self.sources)
        if unused := sorted(set(self.sources).difference(*named)):
            raise ValueError(
                f"{', '.join(unused)}: a source without a weight in any stage; give it one or leave it out"
            )

    def resolved(
        self, sequence_length: int, global_batch_size: int, micro_batch_size: int | None
    ) -> tuple[Setting, ...]:
        """What holds from which position on; the arguments hold until a stage changes them."""
        out = [Setting(0, self.weights, sequence_length, global_batch_size, micro_batch_size)]
        for stage in self.stages:
            changes = {name: value for name, value in vars(stage).items() if value is not None}
            out.append(dataclasses.replace(out[-1], **changes))
        return tuple(out)

    def unit(self, settings: Sequence[Setting]) -> int:
        """Tokens of what is shuffled. Raises ValueError where a sequence length does not divide it."""
        lengths = [setting.sequence_length for setting in settings]
        if min(lengths) < 1:
            raise ValueError(f"sequence_length must be at least 1, but is {min(lengths)}")
        unit = self.unit_tokens or max(lengths)
        for setting in settings:
            if unit % setting.sequence_length:
                raise ValueError(
                    f"sequence_length {setting.sequence_length} from position {setting.start} on does not divide the unit of"
                    f" {unit} tokens that is shuffled: use a divisor of it, or begin a run with unit_tokens that all sequence"
                    " lengths divide"
                )
        return unit


def identity(source: Shards) -> str:
    """What the order of a source depends on: its content and split, not its name or place."""
    return f"{source.dataset_id}/{source.split}"


def slots_of(weights: Mapping[str, float], sources: Mapping[str, Shards]) -> dict[str, int]:
    """Slots of each named source in one period of the deal (deal.py), in the order of identities: renaming changes nothing."""
    names = sorted(weights, key=lambda name: identity(sources[name]))
    return dict(zip(names, exact_counts([weights[name] for name in names]), strict=True))


def _check_sources(sources: Mapping[str, Shards]) -> None:
    if not sources:
        raise ValueError("a mixture needs at least one source")
    (first, split), *others = sources.items()
    names = {identity(split): first}
    for name, other in others:
        if other.tokenizer_sha256 != split.tokenizer_sha256:
            raise ValueError(
                f"sources {first} and {name} were made with different tokenizers: {first} has sha256 {split.tokenizer_sha256},"
                f" {name} has {other.tokenizer_sha256}; prepare one of them again with the tokenizer of the other"
            )
        if twin := names.get(identity(other)):
            raise ValueError(
                f"sources {twin} and {name} are the same dataset, {identity(other)}: it would be read twice in the same order;"
                " name it once and add the weights"
            )
        names[identity(other)] = name


def _check_weights(weights: Mapping[str, float], sources: Mapping[str, Shards]) -> None:
    if unknown := sorted(set(weights) - set(sources)):
        raise ValueError(f"weights name {', '.join(unknown)}, but the sources are {', '.join(sources)}")
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights.values()):
        raise ValueError(
            f"weights must be positive numbers, at least one, but are {dict(weights)}; leave out a source that is not to be"
            " drawn"
        )
    for name, count in slots_of(weights, sources).items():
        if not count:
            raise ValueError(
                f"the weight of {name}, {weights[name]}, is less than one sample in {MAX_PERIOD:,}: it would never be drawn;"
                " give it more or leave it out"
            )
