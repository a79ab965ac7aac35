"""SciQ (Welbl et al., 2017): science questions after a supporting passage. Prompt: lm_eval/tasks/sciq."""

from __future__ import annotations

from grist_eval.columns import Columns, text, words
from grist_eval.row_task import Row, RowTask, Source, question

_CHOICES = ("distractor1", "distractor2", "distractor3", "correct_answer")


def _read(row: Columns) -> Row:
    context = f"{text(row, 'support').lstrip()}\nQuestion: {words(row, 'question')}\nAnswer:"
    return question(context, [words(row, column) for column in _CHOICES], 3)


TASK = RowTask(
    source=Source("allenai/sciq", None, "test", "train"), columns=("support", "question", *_CHOICES), read=_read
)
