"""What came of a run, in figures: the head of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import NamedTuple

from grist_tools.console import count, size
from grist_tools.report_curves import is_memory
from grist_tools.report_html import Html, duration, escape, join, number, table, tag
from grist_tools.report_run import Run, is_number

HELD_OUT = {
    "bits_per_byte": "held-out bits per byte",
    "preference_accuracy": "held-out preference accuracy",
    "loss": "held-out loss",
    "perplexity": "held-out perplexity",
}
LAST_STEPS = 20
_HIGHER_IS_BETTER = {"preference_accuracy"}
MFU_FORMULA = (
    "MFU = tokens per second × training FLOPs per token (grist_model.accounting.flops_per_token: causal, window-aware; "
    "recomputation not counted) / peak FLOP/s of all devices. Of tokens per second and MFU the median over steps is shown."
)


class Figure(NamedTuple):
    name: str
    value: str
    hint: str = ""


def headline(run: Run) -> list[Figure]:
    """The figures that are looked for first; those that the run does not have are left out."""
    found = [figure for key, name in HELD_OUT.items() if (figure := _held_out(run, key, name)) is not None]
    loss = run.metrics.series("loss")
    if loss.values:
        last = loss.values[-LAST_STEPS:]
        found.append(Figure("training loss", number(fmean(last)), f"mean of the last {len(last)} steps"))
    found.append(Figure("steps", f"{run.step:,}", f"of {run.steps:,}" if run.steps is not None else ""))
    for key, name, text in (("tokens", "tokens", count), ("seconds", "training time", duration)):
        if (last := run.last(key)) is not None and math.isfinite(last):
            found.append(Figure(name, text(last), f"{last:,.0f} in all" if key == "tokens" else ""))
    return [*found, *_speed(run), *_memory(run), *_size(run)]


def _held_out(run: Run, key: str, name: str) -> Figure | None:
    """The figure of the end, or the newest one, and the best one where that is another."""
    on_the_way = run.metrics.series(f"validation_{key}")
    if is_number(run.evaluation.get(key)):
        value, hints = float(run.evaluation[key]), ["at the end"]
    elif on_the_way.values:
        value, hints = on_the_way.values[-1], [f"at step {on_the_way.steps[-1]:,}"]
    else:
        return None
    best = (max if key in _HIGHER_IS_BETTER else min)(on_the_way.values, default=value)
    if best != value:
        hints.append(f"best {number(best)} at step {on_the_way.steps[on_the_way.values.index(best)]:,}")
    return Figure(name, number(value), "; ".join(hints))


def _speed(run: Run) -> list[Figure]:
    found = []
    rates, ranks = run.metrics.series("tokens_per_second").values, run.environment.get("world_size")
    if rates:
        each = f"{median(rates) / ranks:,.0f} a rank" if isinstance(ranks, int) and ranks > 1 else ""
        found.append(Figure("tokens per second", f"{median(rates):,.0f}", each))
    shares = run.metrics.series("mfu").values
    if shares:
        found.append(Figure("MFU", f"{median(shares):.1%}"))
    return found


def _memory(run: Run) -> list[Figure]:
    units = {"_bytes": 1, "_mib": 2**20, "_gib": 2**30, "_mb": 10**6, "_gb": 10**9}
    found = []
    for key in filter(is_memory, run.figures()):
        values = run.metrics.series(key).values
        unit = next((scale for end, scale in units.items() if key.endswith(end)), None)
        if values:
            most = number(max(values)) if unit is None else size(max(values) * unit)
            found.append(Figure(key.replace("_", " "), most, "highest of all steps"))
    return found


def _size(run: Run) -> list[Figure]:
    """Parameters, counted from the configuration; nothing for one of another version, whose model is not known."""
    from grist_model.accounting import active_parameters, parameters
    from grist_model.config import ModelConfig

    model = run.config.get("model")
    if not isinstance(model, dict):
        return []
    # Positions that are stretched change no count, and their settings are dataclasses of their own.
    values = {key: value for key, value in model.items() if key not in ("yarn", "rope_scaling")}
    try:
        config = ModelConfig(**values)
        total, active = parameters(config), active_parameters(config)
    except (TypeError, ValueError):
        return [Figure("parameters", "unknown", "this version does not know the configuration's model")]
    return [Figure("parameters", count(total), f"{count(active)} active a token")]


def status(run: Run) -> str:
    """One sentence: how far the run has come."""
    if not run.metrics.training and not run.metrics.evaluation:
        return "No step is written down yet."
    if run.steps is None:
        return f"{run.step:,} steps are written down."
    if run.step < run.steps:
        return f"{run.step:,} of {run.steps:,} steps: going on, or stopped."
    if run.evaluation:
        return f"Complete: all {run.steps:,} steps, and the evaluation at the end."
    return f"All {run.steps:,} steps; there is no evaluation of the end."


def headlines(runs: Sequence[Run]) -> Html:
    """Figures as cards for one run, as a table for several."""
    if len(runs) == 1:
        cards = [
            tag("div", tag("dt", each.name), tag("dd", each.value), tag("dd", each.hint, class_="hint"))
            for each in headline(runs[0])
        ]
        return join(tag("dl", cards, class_="cards"), tag("p", MFU_FORMULA, class_="hint"))
    of_runs = [{each.name: each for each in headline(run)} for run in runs]
    names = dict.fromkeys(name for figures in of_runs for name in figures)
    rows = [[name, *(_cell(figures.get(name)) for figures in of_runs)] for name in names]
    body = table("Figures of every run", ["", *(run.label for run in runs)], rows)
    return join(body, tag("p", MFU_FORMULA, class_="hint"))


def _cell(figure: Figure | None) -> Html:
    if figure is None:
        return escape("none")
    return join(figure.value, tag("p", figure.hint, class_="hint") if figure.hint else None)
