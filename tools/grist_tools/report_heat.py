"""The router's health of every layer, as heat strips: layers from top to bottom, steps from left to right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grist_tools.report_axis import LEFT, RIGHT, TOP, WIDTH, frame, place, step_axis
from grist_tools.report_cells import cells, n_columns
from grist_tools.report_chart import figure, legend
from grist_tools.report_html import Html, missing, number, tag
from grist_tools.report_run import Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVELS = 8
_NUMBERS = {int, float, type(None)}  # null is what some writers make of NaN


@dataclass(frozen=True)
class Strip:
    """A figure of every layer and step.

    Attributes:
        balance: The value of a perfect balance, where the scale begins; None begins at the lowest value.
        counts: Whole numbers. Cells show the worst step of theirs instead of the mean, which would hide a single one.
    """

    title: str
    key: str
    note: str
    balance: float | None
    counts: bool = False


STRIPS = (
    Strip("Busiest expert / mean load", "load_max_over_mean", "mean of the steps in a cell; 1 is balance", 1.0),
    Strip("Variation of load", "load_cv", "mean of the steps in a cell; 0 is balance", 0.0),
    Strip("Dead experts", "dead_experts", "most in one step of a cell", 0.0, counts=True),
    Strip("Router entropy", "router_entropy", "nats, mean of the steps in a cell", None),
)


def heat_strips(run: Run) -> Html:
    """Layers x steps of every figure that the rows have a list over layers of."""
    figures = [drawn for strip in STRIPS if (drawn := heat(strip, run)) is not None]
    if not figures:
        return missing("The rows have no figures of single layers: a dense model, or a run that has just begun.")
    return tag("div", figures, class_="grid")


def by_layer(key: str, run: Run) -> tuple[list[int], NDArray[Any]]:
    """-> steps (N), values (N, layers) float64. Rows with another number of layers than the last one are left out."""
    import numpy as np

    lists = [row for row in run.metrics.training if isinstance(row.get(key), list)]
    rows = [row for row in lists if _NUMBERS.issuperset(map(type, row[key]))]
    layers = len(rows[-1][key]) if rows else 0
    rows = [row for row in rows if len(row[key]) == layers]
    values = np.array([row[key] for row in rows], dtype=np.float64)
    return [row["step"] for row in rows], values.reshape(len(rows), layers)


def heat(strip: Strip, run: Run) -> Html | None:
    """A heat strip as a figure; None when the rows have no such list."""
    import numpy as np

    steps, values = by_layer(strip.key, run)
    if not np.isfinite(values).any():  # nor where there is no row
        return None
    layers = values.shape[1]
    x = step_axis([steps])
    columns, found = cells(steps, values, x, worst=strip.counts)
    low = strip.balance if strip.balance is not None else float(np.nanmin(found))
    high = max(float(np.nanmax(found)), low)
    # Where all is in balance there is one level, and it is the lowest.
    step = max(1, -(-(high - low + 1) // LEVELS)) if strip.counts else (high - low) / LEVELS or 1.0
    used = int(min(LEVELS, (high - low) // step + 1))
    levels = np.clip((found - low) // step, 0, used - 1)
    colors = [i * (LEVELS - 1) // max(1, used - 1) for i in range(used)]  # few levels are as far apart as can be
    height = min(22.0, max(4.0, 180 / layers))
    bottom = TOP + layers * height
    words = (
        f"{strip.title} of {layers} layers over steps {steps[0]:,} to {steps[-1]:,}: from {number(float(np.nanmin(found)))} "
        f"to {number(high)}"
    )
    svg = tag(
        "svg",
        _paths(columns, levels, colors, (RIGHT - LEFT) / n_columns(steps), height),
        frame(x, None, bottom=bottom),
        _names(layers, height),
        [_row(i, values[:, i], steps, height) for i in range(layers)],
        viewBox=f"0 0 {WIDTH} {place(bottom + 26)}",
        role="img",
        aria_label=words,
    )
    entries = [(f"{low + i * step:.3g}", f"block h{color}") for i, color in enumerate(colors)]
    return figure(f"{strip.title} by layer", strip.note, legend(entries), svg)


def _paths(columns: list[int], levels: NDArray[Any], colors: list[int], width: float, height: float) -> list[Html]:
    """Cells (C, layers) as one path a level, of strokes as thick as a layer: an element a cell would be megabytes."""
    import numpy as np

    drawn: dict[int, list[str]] = {}
    # A tenth of a unit over the edge, lest a seam shows where the picture is scaled.
    for layer, at in np.argwhere(np.isfinite(levels).T).tolist():
        corner = f"M{place(LEFT + columns[at] * width)} {place(TOP + (layer + 0.5) * height)}"
        drawn.setdefault(int(levels[at, layer]), []).append(f"{corner}h{place(width + 0.1)}")
    thick = place(height + 0.1)
    return [tag("path", d="".join(drawn[i]), class_=f"heat h{colors[i]}", stroke_width=thick) for i in sorted(drawn)]


def _names(layers: int, height: float) -> list[Html]:
    """Numbers of layers, every so many that they do not touch."""
    every = max(1, -(-13 // int(height)))
    return [
        tag("text", str(i), x=LEFT - 5, y=place(TOP + (i + 0.5) * height + 4), text_anchor="end")
        for i in range(0, layers, every)
    ]


def _row(layer: int, values: NDArray[Any], steps: list[int], height: float) -> Html:
    """What is told of a layer under the pointer."""
    import numpy as np

    kept = values[np.isfinite(values)]
    text = f"layer {layer}: no finite value"
    if len(kept):
        highest = int(np.nanargmax(np.where(np.isfinite(values), values, np.nan)))
        text = (
            f"layer {layer}: mean {number(float(kept.mean()))}, last {number(float(kept[-1]))}, highest "
            f"{number(float(values[highest]))} at step {steps[highest]:,}"
        )
    size = {"x": LEFT, "y": place(TOP + layer * height), "width": RIGHT - LEFT, "height": place(height)}
    return tag("rect", tag("title", text), class_="band", **size)
