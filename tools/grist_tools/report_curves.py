"""The curves of one run, or of several over each other: which figures of `metrics.jsonl` are drawn, and how."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from grist_tools.report_chart import Chart, Line, Mark, draw
from grist_tools.report_html import Html, join, missing, tag
from grist_tools.report_run import Run, is_number
from grist_train.curves import Series, smooth

STEP_TIME = re.compile(r"time_(.+)_ms")


@dataclass(frozen=True)
class Panel:
    """One picture of the page.

    Attributes:
        key: Of training rows; empty when there is only a held-out figure.
        held_out: Of evaluation rows; empty when there is none.
        noisy: Drawn pale, with its moving average over it.
        over_layers: A list over layers, drawn as its mean and its worst.
    """

    title: str
    key: str
    held_out: str = ""
    note: str = ""
    log: str = ""
    from_zero: bool = False
    noisy: bool = True
    over_layers: bool = False


TRAINING = (
    Panel("Loss", "loss", "validation_loss", "nats: of a token, or of a pair of answers", log="wide"),
    Panel("Bits per byte", "", "validation_bits_per_byte", "of held-out text"),
    Panel("Gradient norm", "grad_norm", note="before clipping", log="always"),
    Panel("Learning rate", "lr", noisy=False, from_zero=True),
    Panel("Tokens per second", "tokens_per_second", note="all ranks", from_zero=True),
    Panel("MFU", "mfu", note="share of the peak, 1 is all of it", from_zero=True),
)
ROUTER = (
    Panel("Router entropy", "router_entropy", note="nats, mean over layers and tokens"),
    Panel("Busiest expert / mean load", "load_max_over_mean", note="1 is balance", over_layers=True),
    Panel("Variation of load", "load_cv", note="standard deviation / mean; 0 is balance", over_layers=True),
    Panel("Dead experts", "dead_experts", note="without a token in the step, all layers", from_zero=True),
    Panel("Balance loss", "aux_loss", note="mean over layers and tokens"),
    Panel("Router z-loss", "z_loss", note="mean over layers and tokens"),
)
_NOT_DRAWN = {
    "step",
    "tokens",
    "seconds",
    "validation_perplexity",
}  # an axis, a line that only rises, the loss once more


def training_curves(runs: Sequence[Run]) -> Html:
    """Loss, held-out figures, gradient norm, rates, memory, and whatever else the rows have numbers of."""
    return grid(runs, [*TRAINING, *_sources(runs), *_others(runs)], "There are no curves yet.")


def router_curves(runs: Sequence[Run]) -> Html:
    return grid(runs, ROUTER, "The rows have none of the router's figures.")


def grid(runs: Sequence[Run], panels: Sequence[Panel], otherwise: str) -> Html:
    """The pictures that have something to show, side by side where the page is wide."""
    marks = marks_of(runs[0]) if len(runs) == 1 else []
    figures = [drawn for panel in panels if (drawn := draw(chart_of(panel, runs), marks)) is not None]
    return tag("div", figures, class_="grid") if figures else missing(otherwise)


def chart_of(panel: Panel, runs: Sequence[Run]) -> Chart:
    lines = [
        line for color, run in enumerate(runs) for line in _lines(panel, run, color, smoothing(runs), len(runs) == 1)
    ]
    notes = [panel.note]
    if len(runs) > 1:
        styles = {line.style for line in lines if line.series.steps}
        says = {"raw": "pale: raw", "dotted": "dotted: worst layer", "points": "dots: held out" if panel.key else ""}
        notes += [text for style, text in says.items() if style in styles]
    note = "; ".join(filter(None, notes))
    return Chart(panel.title, tuple(lines), note, panel.log, panel.from_zero, _all_steps(runs))


def _all_steps(runs: Sequence[Run]) -> tuple[int, int] | None:
    """First and last step of the page: all its pictures have one axis, so that what is above each other is of one time."""
    rows = [rows for run in runs for rows in (run.metrics.training, run.metrics.evaluation) if rows]
    return (min(each[0]["step"] for each in rows), max(each[-1]["step"] for each in rows)) if rows else None


def smoothing(runs: Sequence[Run]) -> float:
    """The weight that averages over about a hundredth of the longest run, and over 3 to 200 rows: less is noise in a picture
    of a long run, more is late in that of a short one."""
    rows = max(len(run.metrics.training) for run in runs)
    return 1 - 1 / min(max(rows / 100, 3), 200)


def _lines(panel: Panel, run: Run, color: int, weight: float, alone: bool) -> list[Line]:
    """A run's lines. The legend of one run names the lines, that of several the runs."""
    name = (lambda what: what) if alone else (lambda what: f"{run.label} {what}".strip())
    held_out = run.metrics.series(panel.held_out) if panel.held_out else Series([], [])
    dots = Line(
        name("held out" if panel.key or alone else ""),
        held_out,
        1 if alone and panel.key else color,
        "points",
        listed=alone or not panel.key,
    )
    if not panel.key:
        return [dots]
    series = run.metrics.series(panel.key, sum) if panel.key == "dead_experts" else run.metrics.series(panel.key)
    if panel.noisy:
        lines = [
            Line(name("raw"), series, color, "raw", told=alone, listed=alone),
            Line(name("smoothed" if alone else ""), Series(series.steps, smooth(series.values, weight)), color),
        ]
    else:
        lines = [Line(name(panel.title.lower() if alone else ""), series, color)]
    if panel.over_layers:
        worst = run.metrics.series(panel.key, max)
        smoothed = Series(worst.steps, smooth(worst.values, weight))
        lines.append(Line(name("worst layer"), smoothed, 1 if alone else color, "dotted", listed=alone))
    return [*lines, dots]


def _sources(runs: Sequence[Run]) -> list[Panel]:
    """A panel for each source of a mixture that is evaluated by itself."""
    keys = dict.fromkeys(key for run in runs for row in run.metrics.evaluation for key in row if "/" in key)
    titles = {key: key.removeprefix("validation_").replace("_", " ").replace("/", ", source ") for key in keys}
    return [Panel(title[:1].upper() + title[1:], "", key, "of held-out text") for key, title in titles.items()]


def _others(runs: Sequence[Run]) -> list[Panel]:
    """A panel for every number of the rows that has none of its own: memory, rewards, what a later version adds."""
    drawn = {name for panel in (*TRAINING, *ROUTER) for name in (panel.key, panel.held_out)} | _NOT_DRAWN
    rows = [rows for run in runs for rows in (run.metrics.training, run.metrics.evaluation)]
    found = dict.fromkeys(chain.from_iterable(chain.from_iterable(rows)))
    left = [key for key in found if key not in drawn and "/" not in key and not STEP_TIME.fullmatch(key)]
    keys = [key for key in left if any(is_number(row.get(key)) for row in chain.from_iterable(rows))]
    training = [key for key in keys if not key.startswith("validation_")]
    alone = [key for key in keys if key.startswith("validation_") and key.removeprefix("validation_") not in training]
    panels = [Panel(_title(key), key, f"validation_{key}", from_zero=is_memory(key)) for key in training]
    return panels + [Panel(_title(key.removeprefix("validation_")), "", key, "held out") for key in alone]


def is_memory(key: str) -> bool:
    return "memory" in key


def _title(key: str) -> str:
    text = key.replace("_", " ")
    return text[:1].upper() + text[1:]


def marks_of(run: Run) -> list[Mark]:
    """Where stages begin, and steps with a bad batch or without a finite loss."""
    stages = run.config.get("data") if isinstance(run.config.get("data"), dict) else {}
    begins = [each.get("after_step") for each in (stages or {}).get("stages") or [] if isinstance(each, dict)]
    marks = [Mark(step, "stage", f"a stage begins after step {step:,}") for step in begins if isinstance(step, int)]
    bad = [row.get("step") for row in run.bad_batches]
    return marks + [Mark(step, "bad", "") for step in [*bad, *run.not_finite().steps] if isinstance(step, int)]


def legend_of_runs(runs: Sequence[Run]) -> Html | None:
    """Which colour is which run, for the head of a page of several."""
    if len(runs) == 1:
        return None
    items = [tag("li", tag("span", class_=f"key line s{i}"), run.label) for i, run in enumerate(runs)]
    return join(tag("ul", items, class_="legend"))
