"""WinoGrande (Sakaguchi et al., 2020): which of two names fits the blank? What follows it is scored after both.
Prompt: lm_eval/tasks/winogrande."""

from __future__ import annotations

from grist_eval.columns import Columns, place, words
from grist_eval.row_task import Row, RowTask, Source, schema


def _read(row: Columns) -> Row:
    before, blank, after = words(row, "sentence").partition("_")
    if not blank or not after.strip():
        raise ValueError(f"'sentence' must have a blank, _, with text after it, but is {row['sentence']!r}")
    contexts = [before + words(row, "option1"), before + words(row, "option2")]
    return schema(contexts, after.strip(), place(row, "answer", ["1", "2"]))


TASK = RowTask(
    source=Source("allenai/winogrande", "winogrande_xl", "validation", "train"),
    columns=("sentence", "option1", "option2", "answer"),
    read=_read,
)
