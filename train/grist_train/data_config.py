"""Which tokens a run reads: one dataset or a mixture of several, in one stage or in several.

    data:
      sources:
        books:   {directory: datasets/books, weight: 0.7}
        stories: {directory: datasets/stories, weight: 0.3}
        code:    {directory: datasets/code, weight: 0}         # from the second stage on
      stages:
        - {after_step: 10_000, weights: {books: 0.5, stories: 0.2, code: 0.3}}
        - {after_step: 20_000, sequence_length: 4096, global_size: 32}

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from grist_data.prepare import PrepareConfig

_DIRECTORY = "datasets/shakespeare"


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of a mixture.

    Attributes:
        directory: The token dataset. It is prepared here first when `prepare` is given and it does not exist yet.
        weight: Share of the samples at the beginning, relative to the others; 0 when only a later stage draws from it.
        prepare: How to make the dataset from text. All sources need one tokenizer: give the first one's directory as
            `tokenizer` to the others.
    """

    directory: str
    weight: float = 1.0
    prepare: PrepareConfig | None = None


@dataclass(frozen=True)
class StageConfig:
    """A change on the way; what is None stays as it was. Stages that have begun may not change when a run goes on.

    Attributes:
        after_step: Steps that come before it.
        weights: Shares of the sources from here on; sources that are left out are not drawn.
        sequence_length: T, tokens a sample.
        global_size: Sequences of a step.
        micro_size: Sequences a rank puts through the model at once.
    """

    after_step: int
    weights: dict[str, float] | None = None
    sequence_length: int | None = None
    global_size: int | None = None
    micro_size: int | None = None


@dataclass(frozen=True)
class DataConfig:
    """Which tokens a run reads.

    Attributes:
        directory: The token dataset. It is prepared here first when `prepare` is given and it does not exist yet.
        prepare: How to make the dataset from text; None when `directory` was prepared beforehand. With `tokenizer: initial` it
            is made with the tokenizer of the run's initial model.
        sources: Instead of `directory`, several datasets by name, drawn by weight.
        stages: Changes of weights, sequence length and batch size on the way.
        sequence_length: T, tokens a sample.
        unit_tokens: What is shuffled; every sequence length divides it. None is the longest of them: set it to be free to go
            on with longer sequences one day.
        packing: `none` cuts windows out of the text; `best-fit` puts whole documents side by side into rows, with attention
            inside documents.
        document_masks: Keep attention inside documents (packed `cu_seqlens`) instead of letting it cross their ends.
        verify: How much of the shards to check when opening them: header, lazy (a block when first read) or full.
        log_samples: Write what every step was trained on to `RUN/samples_seen/rank-N.jsonl`: source, epoch, window and a hash
            of the tokens of each sample.
    """

    directory: str = _DIRECTORY
    prepare: PrepareConfig | None = None
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    stages: tuple[StageConfig, ...] = ()
    sequence_length: int = 256
    unit_tokens: int | None = None
    packing: Literal["none", "best-fit"] = "none"
    document_masks: bool = False
    verify: Literal["header", "lazy", "full"] = "header"
    log_samples: bool = False

    def all_sources(self) -> dict[str, SourceConfig]:
        """The sources by name; a single dataset is called `data`."""
        return dict(self.sources) or {"data": SourceConfig(self.directory, 1.0, self.prepare)}


@dataclass(frozen=True)
class BatchConfig:
    """Batch sizes, in sequences.

    Attributes:
        global_size: Sequences in one optimizer step, over all ranks; what a step computes depends on this alone.
        micro_size: Sequences a rank puts through the model at once; None takes the rank's whole share. Runs that cut a step
            into the same micro-batches agree to the last bit on one and on two ranks; cut otherwise, sums round differently
            (1e-7 relative), until a token near the border between two experts goes to the other one.
    """

    global_size: int = 16
    micro_size: int | None = None


@dataclass(frozen=True)
class Phase:
    """What holds after `after_step` steps: a stage with nothing left open but micro_size."""

    after_step: int
    weights: Mapping[str, float]
    sequence_length: int
    global_size: int
    micro_size: int | None

    @property
    def tokens_per_step(self) -> int:
        return self.global_size * self.sequence_length


def phases(data: DataConfig, batch: BatchConfig) -> tuple[Phase, ...]:
    """The beginning and every stage, in order."""
    weights = {name: source.weight for name, source in data.all_sources().items() if source.weight}
    out = [Phase(0, weights, data.sequence_length, batch.global_size, batch.micro_size)]
    for stage in data.stages:
        changes = {name: value for name, value in vars(stage).items() if value is not None}
        out.append(dataclasses.replace(out[-1], **changes))
    return tuple(out)


def check_data(data: DataConfig, batch: BatchConfig) -> None:
    """Raises ValueError for what cannot be meant."""
    if data.sources and (data.directory != _DIRECTORY or data.prepare is not None):
        raise ValueError("data.sources stands instead of data.directory and data.prepare: give one or the other")
    for name, source in data.sources.items():
        if not (math.isfinite(source.weight) and source.weight >= 0):
            raise ValueError(f"data.sources.{name}.weight must be at least 0, but is {source.weight}")
    if data.sources and not any(source.weight for source in data.sources.values()):
        raise ValueError("the weights of data.sources are all 0: at least one source is drawn from at the beginning")
    before = 0
    for stage in data.stages:
        if stage.after_step <= before:
            raise ValueError(
                f"data.stages must begin after rising numbers of steps above 0, but {stage.after_step} follows {before}"
            )
        before = stage.after_step
    for phase in phases(data, batch):
        if phase.global_size < 1:
            raise ValueError(f"batch.global_size must be at least 1, but is {phase.global_size}{_where(phase)}")


def check_lengths(phases: tuple[Phase, ...], context_length: int) -> None:
    """Raises ValueError for samples longer than the model's context."""
    for phase in phases:
        if phase.sequence_length > context_length:
            raise ValueError(
                f"data.sequence_length {phase.sequence_length}{_where(phase)} is longer than model.context_length "
                f"{context_length}: raise the latter or shorten the samples"
            )


def _where(phase: Phase) -> str:
    return f" (after step {phase.after_step})" if phase.after_step else ""
