"""What a task of questions is: where its rows come from, and how the columns of a row become texts for a model.

Prompts are those of EleutherAI's lm_eval for the task of the same name, so that scores compare item by item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

# Between few-shot examples, and between the last one and the question.
SEPARATOR = "\n\n"


class Source(NamedTuple):
    """A dataset on the hub, for `datasets.load_dataset`: its rows to score, and the split that examples are drawn from."""

    path: str
    subset: str | None
    split: str
    examples_split: str | None


@dataclass(frozen=True)
class Row:
    """One question.

    contexts and continuations: pairs to score, as many of one as of the other. A task that generates has one context.
    gold: index of the right pair. example: the row with its answer, as a few-shot example. choices: the answers without their
    contexts, whose lengths normalize. group: rows of a group take examples from it. description: stands before the examples.
    reference: what generated text is held against.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...] = ()
    gold: int | None = None
    example: str = ""
    choices: tuple[str, ...] = ()
    group: str = ""
    description: str = ""
    reference: Any = None


@dataclass(frozen=True)
class Generation:
    """How a task lets the model write: up to one of the strings `until`, or `max_new_tokens` tokens; greedy.

    metrics: the text written and the row's reference -> names and values, 0 or 1. runs_code: it runs what the model wrote.
    """

    until: tuple[str, ...]
    metrics: Callable[[str, Any], dict[str, float]]
    max_new_tokens: int = 256
    runs_code: bool = False


@dataclass(frozen=True)
class RowTask:
    """A task of questions.

    columns: those that `read` looks at. read: the columns of a row -> Row; ValueError for a row that is none. shots: examples
    before a question, unless asked otherwise; drawn at random, or the first ones. main: the metric that stands for the task.
    chance: what guessing makes of it, or None where that is the mean of 1 / choices.
    """

    source: Source
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Row]
    shots: int = 0
    shots_from: Literal["random", "first"] = "random"
    main: str = "acc"
    chance: float | None = None
    generation: Generation | None = None


def question(context: str, choices: list[str], gold: int, **others: str) -> Row:
    """One context and several answers, each after a space."""
    return Row(
        contexts=(context,) * len(choices),
        continuations=tuple(f" {choice}" for choice in choices),
        gold=gold,
        example=f"{context} {choices[gold]}",
        choices=tuple(choices),
        **others,
    )


def schema(contexts: list[str], ending: str, gold: int) -> Row:
    """Several contexts and one ending, after a space (Trinh and Le, 2018: partial scoring)."""
    return Row(
        contexts=tuple(contexts),
        continuations=(f" {ending}",) * len(contexts),
        gold=gold,
        example=f"{contexts[gold]} {ending}",
    )
