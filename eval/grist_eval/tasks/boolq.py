"""BoolQ (Clark et al., 2019), as in SuperGLUE: yes or no, by a passage. Prompt: lm_eval/tasks/super_glue/boolq."""

from __future__ import annotations

from grist_eval.columns import Columns, index, words
from grist_eval.row_task import Row, RowTask, Source, question


def _read(row: Columns) -> Row:
    context = f"{words(row, 'passage')}\nQuestion: {words(row, 'question')}?\nAnswer:"
    return question(context, ["no", "yes"], index(row, "label", 2))


TASK = RowTask(
    source=Source("aps/super_glue", "boolq", "validation", "train"),
    columns=("passage", "question", "label"),
    read=_read,
    chance=0.62,  # the answer "yes", always (DCLM, eval/eval_meta_data_v1.csv)
)
