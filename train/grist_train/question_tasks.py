"""Tasks of questions during training: their rows, read once, and what the model scores on them."""

from __future__ import annotations

import functools
from typing import Any

from grist_data import Tokenizer
from grist_eval.questions import Questions, Settings, evaluate_tasks, load_questions
from grist_model.transformer import Transformer
from grist_train.config import EvaluateConfig
from grist_train.distributed import World

BY_NAME = "hub"


def check_questions(settings: EvaluateConfig, has_held_out: bool) -> None:
    """Read the rows of `evaluate.tasks`, so that what is wrong with them is told before training begins.

    Raises:
        ValueError: an unknown task, or one that runs code that the model wrote; bad rows, by file and row; tasks, and nothing
            is held out: they are asked when that is evaluated.
        FileNotFoundError, ImportError: no such file of rows; rows by name, and the package `datasets` is not installed.
    """
    if settings.tasks and not has_held_out:
        raise ValueError(
            f"evaluate.tasks ({', '.join(settings.tasks)}) are asked when held-out data are evaluated, but none are held out: "
            "give the data a validation split"
        )
    questions_of(settings)


def questions_of(settings: EvaluateConfig) -> list[Questions]:
    """Tasks with their rows, kept after the first call. Raises as `check_questions` does for rows."""
    return _questions(tuple(settings.tasks.items()), settings.task_rows, settings.task_shots)


@functools.cache
def _questions(tasks: tuple[tuple[str, str], ...], rows: int | None, shots: int | None) -> list[Questions]:
    files = {name: path for name, path in tasks if path != BY_NAME}
    return load_questions([name for name, _ in tasks], data=files, settings=Settings(shots=shots, limit=rows))


def task_scores(model: Transformer, tokenizer: Tokenizer, settings: EvaluateConfig, world: World) -> dict[str, Any]:
    """`tasks`, by name what `evaluate_tasks` says, and `core`, the mean of their centred scores; nothing where no tasks are
    asked for. All ranks call this together."""
    if not settings.tasks:
        return {}
    found = evaluate_tasks(
        model,
        tokenizer,
        questions_of(settings),
        settings=Settings(shots=settings.task_shots, limit=settings.task_rows),
        rank=world.rank,
        world_size=world.size,
        group=world.host_group,
    )
    return {"tasks": found["tasks"], "core": found["core"]}
