"""CommonsenseQA (Talmor et al., 2019): the letter of one of five answers. Prompt: lm_eval/tasks/commonsense_qa."""

from __future__ import annotations

from grist_eval.columns import Columns, part, place, texts, words
from grist_eval.row_task import Row, RowTask, Source, question

_LETTERS = ["A", "B", "C", "D", "E"]


def _read(row: Columns) -> Row:
    choices = texts(part(row, "choices"), "text", 5)
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=True))
    context = f"Question: {words(row, 'question').strip()}\n{listed}\nAnswer:"
    return question(context, _LETTERS, place(row, "answerKey", _LETTERS))


TASK = RowTask(
    source=Source("tau/commonsense_qa", None, "validation", "train"),
    columns=("question", "choices", "answerKey"),
    read=_read,
)
