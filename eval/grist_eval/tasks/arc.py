"""ARC, easy and challenge (Clark et al., 2018): science questions of schools. Prompt: lm_eval/tasks/arc."""

from __future__ import annotations

from grist_eval.columns import Columns, labelled_choices, words
from grist_eval.row_task import Row, RowTask, Source, question


def _read(row: Columns) -> Row:
    return question(f"Question: {words(row, 'question')}\nAnswer:", *labelled_choices(row))


def _task(subset: str, main: str) -> RowTask:
    source = Source("allenai/ai2_arc", subset, "test", "train")
    return RowTask(source, ("question", "choices", "answerKey"), _read, main=main)


EASY = _task("ARC-Easy", "acc")
CHALLENGE = _task("ARC-Challenge", "acc_norm")
