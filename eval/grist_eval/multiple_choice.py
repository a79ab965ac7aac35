"""What the log-likelihoods of a question's answers say: which answer a model picks, under four ways to compare lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grist_eval.row_task import Row
from grist_eval.scoring import Score
from grist_eval.statistics import mean_and_error, perplexity_and_error


def row_metrics(row: Row, scores: Sequence[Score]) -> dict[str, float]:
    """Metrics of one row, 0 or 1, from the scores of its pairs.

    Of several: `acc`, whether the right one is the likeliest; `acc_norm`, per character of the answer, which is what lm_eval
    calls so; `acc_bytes`, per UTF-8 byte of it, the same for ASCII and fairer elsewhere; `acc_tokens`, per token of it.
    Of one (LAMBADA): `acc`, whether every token was the likeliest, and `log_likelihood`. Of equal ones the first is picked.
    """
    totals = [score.log_likelihood for score in scores]
    if row.gold is None:
        return {"acc": float(scores[0].greedy), "log_likelihood": totals[0]}
    found = {"acc": _picks(totals, row.gold)}
    if row.choices:
        lengths = {
            "acc_norm": [len(choice) for choice in row.choices],
            "acc_bytes": [len(choice.encode()) for choice in row.choices],
            "acc_tokens": [score.tokens for score in scores],
        }
        for name, of_choice in lengths.items():
            found[name] = _picks([total / n for total, n in zip(totals, of_choice, strict=True)], row.gold)
    return found


def _picks(values: Sequence[float], gold: int) -> float:
    return float(max(range(len(values)), key=lambda i: values[i]) == gold)


def summary(metrics: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Mean of each metric over the rows, and beside it NAME_stderr; of log-likelihoods, the perplexity."""
    found: dict[str, float | None] = {}
    for name in metrics[0]:
        values = [of_row[name] for of_row in metrics]
        if name == "log_likelihood":
            found["perplexity"], found["perplexity_stderr"] = perplexity_and_error(values)
        else:
            found[name], found[f"{name}_stderr"] = mean_and_error(values)
    return found


def chance_of(rows: Sequence[Row]) -> float:
    """What guessing makes of rows with choices: the mean of 1 / choices."""
    return sum(1 / len(row.continuations) for row in rows) / len(rows)
