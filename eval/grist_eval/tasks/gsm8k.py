"""GSM8K (Cobbe et al., 2021): word problems, the number after `####`. Prompt and metrics: lm_eval/tasks/gsm8k."""

from __future__ import annotations

import re

from grist_eval.columns import Columns, words
from grist_eval.row_task import Generation, Row, RowTask, Source

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


def _read(row: Columns) -> Row:
    answer = words(row, "answer")
    if "#### " not in answer:
        raise ValueError(f"'answer' must end in '#### ' and a number, but is {answer!r}")
    context = f"Question: {words(row, 'question')}\nAnswer:"
    return Row((context,), example=f"{context} {answer}", reference=answer)


def _metrics(text: str, answer: str) -> dict[str, float]:
    """strict_match: the first number after `####`; flexible_extract: the last number of the text."""
    strict = _STRICT.findall(text)
    flexible = [first or second for first, second in _FLEXIBLE.findall(text)]
    gold = _bare(answer)
    return {
        "strict_match": float(bool(strict) and _bare(strict[0]) == gold),
        "flexible_extract": float(bool(flexible) and _bare(flexible[-1].strip()) == gold),
    }


def _bare(number: str) -> str:
    for pattern in _IGNORED:
        number = re.sub(pattern, "", number)
    return number.lower()


TASK = RowTask(
    source=Source("openai/gsm8k", "main", "test", "train"),
    columns=("question", "answer"),
    read=_read,
    shots=5,
    main="strict_match",
    chance=0.0,
    generation=Generation(("Question:", "</s>", "<|im_end|>"), _metrics),
)
