"""What a run learns from: tokens, or pairs of answers. The loop in __main__.py asks a task for batches, losses and figures."""

from __future__ import annotations

from typing import Any

import numpy as np

from grist_data import Batch, Batches, Tokenizer
from grist_model.hub import local_directory
from grist_model.transformer import Transformer
from grist_train.config import TrainConfig
from grist_train.data import open_batches, open_data, stage_starts, stages_begun
from grist_train.distributed import World
from grist_train.finish import validate
from grist_train.initial import check_tokenizer
from grist_train.loss import MicroBatchResult, language_model_loss
from grist_train.preference_batches import PairBatch, PreferenceBatches
from grist_train.preference_loss import FIGURES, preference_loss
from grist_train.preferences import measured, open_pair_batches, read_pairs, validate_pairs
from grist_train.question_tasks import check_questions, task_scores

TEXT_SHOWN = 1000  # characters of a sample that a report shows


class NextToken:
    """The next token of the text in `data`. figures: names of what `loss` measures beside the loss. of_answers: whether it is
    answers in conversations that are trained."""

    figures = ()

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.data = open_data(config, world)
        self.tokenizer = self.data.tokenizer
        check_tokenizer(config, self.tokenizer)
        self.has_held_out = bool(self.data.held_out)
        check_questions(config.evaluate, self.has_held_out)
        self.of_answers = any(shards.has_loss_mask for shards in self.data.train.values())

    def batches(self, model: Transformer, state: dict[str, Any] | None) -> Batches:
        """From the beginning, or from where a checkpoint's state.json left them."""
        self._starts = stage_starts(self.config.phases, state)
        self._batches = open_batches(self.config, self.world, self.data, self._starts, state)
        return self._batches

    def position(self, step: int) -> dict[str, Any]:
        """What state.json says of the data after so many steps."""
        return {"batches": self._batches.state_dict(), "stages": stages_begun(self.config, step, self._starts)}

    def loss(self, model: Transformer, batch: Batch, counted: int, tokens: int) -> MicroBatchResult:
        """counted, tokens: targets that count, and tokens, of the whole step over all ranks."""
        return language_model_loss(model, self.config.model, batch, counted, tokens)

    def describe(self, first: int, n: int) -> list[dict[str, Any]]:
        """The samples at the positions from first on: where they are from, and how their text begins."""
        positions = first + np.arange(n)
        order = self._batches.order
        rows = (
            self._batches.at(positions[i : i + 1]).ids_BT[0].tolist() for i in range(n)
        )  # one by one: they may be long
        return [
            {"source": order.names[source], "epoch": int(epoch), "window": int(window), "token": int(token)}
            | {"text": self.tokenizer.decode(row)[:TEXT_SHOWN]}
            for source, epoch, window, token, row in zip(*order.samples(positions)[:4], rows, strict=True)
        ]

    def validate(self, model: Transformer, final: bool = False) -> dict[str, Any]:
        """Held-out figures; `final` reads all of it."""
        return validate(model, self.data, self._batches.sequence_length, self.config, self.world, final)


class Preference:
    """Which of two answers is better, of the pairs in `preferences`."""

    figures, of_answers = FIGURES, True

    def __init__(self, config: TrainConfig, world: World) -> None:
        assert config.preferences is not None
        assert config.initial is not None
        self.config, self.world, self.settings = config, world, config.preferences
        self.tokenizer = Tokenizer.load(local_directory(config.initial))
        self._pairs = read_pairs(config, self.tokenizer, world)
        self.has_held_out = self.settings.val_fraction > 0 and len(self._pairs) > 1
        check_questions(config.evaluate, self.has_held_out)

    def batches(self, model: Transformer, state: dict[str, Any] | None) -> PreferenceBatches:
        """model: the reference, unless a run goes on."""
        self._measured = measured(self._pairs, self.config, model, self.world, resuming=state is not None)
        self._batches = open_pair_batches(self._measured, self.config, self.world, state)
        return self._batches

    def position(self, step: int) -> dict[str, Any]:
        return {"batches": self._batches.state_dict(), "stages": []}

    def loss(self, model: Transformer, batch: Batch, counted: int, tokens: int) -> MicroBatchResult:
        """counted: pairs of the whole step."""
        assert isinstance(batch, PairBatch)
        return preference_loss(model, self.config.model, batch, self.settings, counted, tokens)

    def describe(self, first: int, n: int) -> list[dict[str, Any]]:
        """The pairs at the positions from first on: their number, and how their texts begin."""
        numbers = [self._measured.train[self._batches.pair_at(position)] for position in range(first, first + n)]
        return [
            {"pair": number}
            | {
                name: self.tokenizer.decode(getattr(self._pairs[number], f"{name}_ids").tolist())[:TEXT_SHOWN]
                for name in ("chosen", "rejected")
            }
            for number in numbers
        ]

    def validate(self, model: Transformer, final: bool = False) -> dict[str, Any]:
        """Always of all pairs that are held out."""
        of_tasks = task_scores(model, self.tokenizer, self.config.evaluate, self.world)
        return {**validate_pairs(model, self._measured, self.config, self.world), **of_tasks}


def open_task(config: TrainConfig, world: World) -> NextToken | Preference:
    """Raises ValueError for data that are not there or do not fit the model."""
    return NextToken(config, world) if config.preferences is None else Preference(config, world)
