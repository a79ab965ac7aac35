"""HellaSwag (Zellers et al., 2019): which of four endings follows? Prompt: lm_eval/tasks/hellaswag."""

from __future__ import annotations

import re

from grist_eval.columns import Columns, index, text, texts
from grist_eval.row_task import Row, RowTask, Source, question


def _read(row: Columns) -> Row:
    endings = texts(row, "endings", 4)
    scene = f"{text(row, 'ctx_a')} {text(row, 'ctx_b').capitalize()}"
    context = _plain(f"{text(row, 'activity_label')}: {scene}")
    return question(context, [_plain(ending) for ending in endings], index(row, "label", 4))


def _plain(written: str) -> str:
    """Without the brackets that WikiHow's articles left in the texts."""
    without_titles = written.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", without_titles).replace("  ", " ")


TASK = RowTask(
    source=Source("Rowan/hellaswag", None, "validation", "train"),
    columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    read=_read,
    main="acc_norm",
)
