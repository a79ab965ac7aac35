"""MMLU (Hendrycks et al., 2021): the letter of one of four answers, 57 subjects. Prompt: lm_eval/tasks/mmlu/default.

Examples are the first rows of the subject's dev split. The accuracy is over all rows, as lm_eval weighs subjects by size.
"""

from __future__ import annotations

from grist_eval.columns import Columns, index, texts, words
from grist_eval.row_task import Row, RowTask, Source, question

_LETTERS = ["A", "B", "C", "D"]


def _read(row: Columns) -> Row:
    subject = words(row, "subject")
    choices = texts(row, "choices", 4)
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=True))
    about = subject.replace("_", " ")
    return question(
        f"{words(row, 'question').strip()}\n{listed}\nAnswer:",
        _LETTERS,
        index(row, "answer", 4),
        group=subject,
        description=f"The following are multiple choice questions (with answers) about {about}.\n\n",
    )


TASK = RowTask(
    source=Source("cais/mmlu", "all", "test", "dev"),
    columns=("question", "subject", "choices", "answer"),
    read=_read,
    shots_from="first",
)
