"""HumanEval (Chen et al., 2021): a function's body that passes its tests. Prompt: lm_eval/tasks/humaneval.

Runs what the model wrote: `grist_eval.sandbox` says what that is kept from, and what not.
"""

from __future__ import annotations

from grist_eval.columns import Columns, words
from grist_eval.row_task import Generation, Row, RowTask, Source


def _read(row: Columns) -> Row:
    prompt, tests = words(row, "prompt"), words(row, "test")
    return Row((prompt,), example=prompt, reference=(prompt, f"{tests}\ncheck({words(row, 'entry_point')})"))


def _metrics(text: str, reference: tuple[str, str]) -> dict[str, float]:
    from grist_eval.sandbox import passes

    prompt, tests = reference
    return {"pass_at_1": float(passes(f"{prompt}{text}\n{tests}"))}


TASK = RowTask(
    source=Source("openai/openai_humaneval", None, "test", None),
    columns=("prompt", "test", "entry_point"),
    read=_read,
    main="pass_at_1",
    chance=0.0,
    generation=Generation(("\nclass", "\ndef", "\n#", "\nif", "\nprint"), _metrics, 1024, runs_code=True),
)
