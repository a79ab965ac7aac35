"""Few-shot prompts: which examples stand before a question. The draws are those of lm_eval in one process, by the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from grist_eval.row_task import SEPARATOR, Row, RowTask

SEED = 1234  # lm_eval's own for examples


def prefixes(task: RowTask, rows: Sequence[Row], pool: Sequence[Row] | None, shots: int, seed: int = SEED) -> list[str]:
    """What stands before the context of each row: its description and `shots` examples with their answers.

    pool: rows to draw from; None: the rows themselves. A row is never its own example. One generator draws for all rows in
    their order, so that the first rows have the same examples however many there are.

    Raises:
        ValueError: shots is negative, or the pool is too small.
    """
    if shots < 0:
        raise ValueError(f"the number of examples must be 0 or more, but is {shots}")
    if shots == 0:
        return [row.description for row in rows]
    draw = random.Random(seed)
    pools: dict[str, list[Row]] = {}
    for row in rows if pool is None else pool:
        pools.setdefault(row.group, []).append(row)
    # Where lm_eval knows no test split, it draws one example more than it needs, in case the row itself is among them.
    one_more = task.source.split != "test" or pool is None
    texts = []
    for row in rows:
        examples = _examples(task, pools.get(row.group, []), row, shots, one_more, draw)
        texts.append(row.description + "".join(example.example + SEPARATOR for example in examples))
    return texts


def _examples(
    task: RowTask, pool: list[Row], row: Row, shots: int, one_more: bool, draw: random.Random
) -> Sequence[Row]:
    needed = shots + one_more
    if task.shots_from == "first":
        found: Sequence[Row] = [other for other in pool[:needed] if other != row or not one_more][:shots]
    elif len(pool) < needed:
        found = []
    else:
        found = [other for other in draw.sample(pool, needed) if other != row or not one_more][:shots]
        if len(found) < shots:  # the row is in the pool several times
            others = [other for other in pool if other != row]
            found = draw.sample(others, shots) if len(others) >= shots else []
    if len(found) < shots:
        of_group = f" of group {row.group!r}" if row.group else ""
        raise ValueError(
            f"{shots} examples were asked for, but there are {len(pool)} rows{of_group} to draw from: "
            "ask for fewer, or pass more with --task-examples"
        )
    return found
