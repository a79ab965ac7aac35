"""TriviaQA (Joshi et al., 2017), without context: exact match with any alias. Prompt and metric: lm_eval/tasks/triviaqa."""

from __future__ import annotations

import string
from collections.abc import Sequence

from grist_eval.columns import Columns, part, words
from grist_eval.row_task import Generation, Row, RowTask, Source

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _read(row: Columns) -> Row:
    aliases = part(row, "answer").get("aliases")
    if not isinstance(aliases, Sequence) or not aliases or not all(isinstance(alias, str) for alias in aliases):
        raise ValueError(f"'answer' must hold 'aliases', at least one string, but is {row['answer']!r}")
    context = f"Question: {words(row, 'question')}?\nAnswer:"
    return Row((context,), example=f"{context} {aliases[0]}", reference=list(aliases))


def _metrics(text: str, aliases: list[str]) -> dict[str, float]:
    found = _bare(text.strip())
    return {"exact_match": float(any(_bare(alias) == found for alias in aliases))}


def _bare(answer: str) -> str:
    return answer.lower().translate(_NO_PUNCTUATION)


TASK = RowTask(
    source=Source("mandarjoshi/trivia_qa", "rc.nocontext", "validation", "train"),
    columns=("question", "answer"),
    read=_read,
    main="exact_match",
    chance=0.0,
    generation=Generation(("\n", ".", ","), _metrics),
)
