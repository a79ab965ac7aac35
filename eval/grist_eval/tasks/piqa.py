"""PIQA (Bisk et al., 2020): which of two ways reaches the goal? Prompt: lm_eval/tasks/piqa."""

from __future__ import annotations

from grist_eval.columns import Columns, index, words
from grist_eval.row_task import Row, RowTask, Source, question


def _read(row: Columns) -> Row:
    ways = [words(row, "sol1"), words(row, "sol2")]
    return question(f"Question: {words(row, 'goal')}\nAnswer:", ways, index(row, "label", 2))


TASK = RowTask(
    source=Source("baber/piqa", None, "validation", "train"), columns=("goal", "sol1", "sol2", "label"), read=_read
)
