"""What a step's time goes to: keys `time_*_ms` of the rows, as areas over each other and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grist_tools.report_axis import HEIGHT, WIDTH, frame, step_axis, value_axis
from grist_tools.report_cells import cells, n_columns
from grist_tools.report_chart import Line, bands, figure, legend, path_of
from grist_tools.report_curves import STEP_TIME
from grist_tools.report_html import Html, missing, number, table, tag
from grist_tools.report_run import Run, is_number
from grist_train.curves import Series

if TYPE_CHECKING:
    from numpy.typing import NDArray

PARTS = ("data", "forward", "backward", "optimizer", "communication", "checkpoint")  # a step, in its order


def step_time(run: Run) -> Html:
    """A picture and a table of milliseconds, or a line that says that the rows have none."""
    import numpy as np

    found = {match.group(1) for key in run.figures() if (match := STEP_TIME.fullmatch(key))}
    parts = [part for part in PARTS if part in found] + sorted(found - set(PARTS))
    rows = [row for row in run.metrics.training if any(is_number(row.get(f"time_{part}_ms")) for part in parts)]
    if not rows:
        return missing("The rows have no times of the parts of a step (time_*_ms).")
    values = np.array([[_ms(row, part) for part in parts] for row in rows])
    picture = _stack(parts, [row["step"] for row in rows], values)
    return tag("div", picture, _table(parts, values), class_="grid")


def _ms(row: dict[str, Any], part: str) -> float:
    """A part that did not take place in a step, such as a checkpoint, took no time."""
    value = row.get(f"time_{part}_ms")
    return float(value) if is_number(value) and 0 <= value < float("inf") else 0.0


def _table(parts: Sequence[str], values: NDArray[Any]) -> Html:
    whole = float(values.sum()) or 1.0
    columns = [*zip(parts, values.T, strict=True), ("together", values.sum(1))]
    lines = [
        [name, number(float(each.mean())), f"{float(each.sum()) / whole:.1%}", number(float(each.max()))]
        for name, each in columns
    ]
    return table("Milliseconds of a step", ["part", "mean", "share", "slowest step"], lines)


def _stack(parts: Sequence[str], steps: list[int], values: NDArray[Any]) -> Html:
    """Areas over each other, the first part lowest. A column shows the mean of its steps, so that parts still add up."""
    import numpy as np

    x = step_axis([steps])
    columns, found = cells(steps, values, x)
    at = np.array(columns) + 0.5
    middles = (x.low + at / n_columns(steps) * (x.high - x.low)).tolist()
    if len(middles) == 1:  # an area needs two sides
        middles, found = [x.low, x.high], np.repeat(found, 2, axis=0)
    middles[0], middles[-1] = x.low, x.high
    tops = np.cumsum(found, axis=1)
    y = value_axis([0.0, float(tops.max())], from_zero=True)
    floors = np.hstack([np.zeros_like(tops[:, :1]), tops[:, :-1]])
    areas = []
    for i in range(len(parts)):
        there = path_of(middles, tops[:, i].tolist(), x, y)
        back = path_of(middles[::-1], floors[::-1, i].tolist(), x, y)
        areas.append(tag("path", d=f"{there}L{back[1:]}z", class_=f"area s{i % 8}"))
    told = [Line(part, Series(steps, values[:, i].tolist()), i % 8) for i, part in enumerate(parts)]
    words = f"Milliseconds of a step over steps {steps[0]:,} to {steps[-1]:,}: {', '.join(parts)}"
    size = f"0 0 {WIDTH} {HEIGHT}"
    svg = tag("svg", areas, frame(x, y), bands(told, x), viewBox=size, role="img", aria_label=words)
    entries = [(part, f"block s{i % 8}") for i, part in enumerate(parts)]
    return figure("Step time", "milliseconds, the parts over each other", legend(entries), svg)
