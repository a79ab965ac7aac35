"""LAMBADA (Paperno et al., 2016), OpenAI's version: the last word of a passage. Prompt: lm_eval/tasks/lambada."""

from __future__ import annotations

from grist_eval.columns import Columns, words
from grist_eval.row_task import Row, RowTask, Source


def _read(row: Columns) -> Row:
    passage, space, word = words(row, "text").rpartition(" ")
    if not passage.strip() or not word:
        raise ValueError(f"'text' must be a passage that ends in a word after a space, but is {row['text']!r}")
    # Two spaces in an example: lm_eval's target begins with one, and its delimiter is another.
    return Row(contexts=(passage,), continuations=(space + word,), example=f"{passage} {space}{word}")


TASK = RowTask(
    source=Source("EleutherAI/lambada_openai", "default", "test", None), columns=("text",), read=_read, chance=0.0
)
