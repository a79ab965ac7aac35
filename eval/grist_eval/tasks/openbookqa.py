"""OpenBookQA (Mihaylov et al., 2018): elementary science. Prompt: lm_eval/tasks/openbookqa."""

from __future__ import annotations

from grist_eval.columns import Columns, labelled_choices, words
from grist_eval.row_task import Row, RowTask, Source, question


def _read(row: Columns) -> Row:
    return question(words(row, "question_stem"), *labelled_choices(row))


TASK = RowTask(
    source=Source("allenai/openbookqa", "main", "test", "train"),
    columns=("question_stem", "choices", "answerKey"),
    read=_read,
    main="acc_norm",
)
