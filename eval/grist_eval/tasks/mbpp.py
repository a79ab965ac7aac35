"""MBPP (Austin et al., 2021): a function from a description and three tests. Prompt: lm_eval/tasks/mbpp.

lm_eval shows the tasks 2, 3 and 4, the paper's own three examples; they are the first rows of the split `prompt` after task 1.
Runs what the model wrote: `grist_eval.sandbox` says what that is kept from, and what not.
"""

from __future__ import annotations

from grist_eval.columns import Columns, texts, words
from grist_eval.row_task import Generation, Row, RowTask, Source


def _read(row: Columns) -> Row:
    tests = texts(row, "test_list", 3)
    listed = "\n".join(tests)
    context = (
        f"You are an expert Python programmer, and here is your task: {words(row, 'text')} "
        f"Your code should pass these tests:\n\n{listed}\n[BEGIN]\n"
    )
    return Row((context,), example=f"{context}{words(row, 'code')}\n[DONE]", reference=listed)


def _metrics(text: str, tests: str) -> dict[str, float]:
    from grist_eval.sandbox import passes

    return {"pass_at_1": float(passes(f"{text}\n{tests}"))}


TASK = RowTask(
    source=Source("google-research-datasets/mbpp", "full", "test", "prompt[1:4]"),
    columns=("text", "code", "test_list"),
    read=_read,
    shots=3,
    shots_from="first",
    main="pass_at_1",
    chance=0.0,
    generation=Generation(("[DONE]",), _metrics, runs_code=True),
)
