"""Line charts as inline SVG: thinned lines, a legend, and a band of the picture that tells its values at every place.

Colours are classes: report_page.css has them for light and dark.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from grist_tools.report_axis import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, frame, place, step_axis, value_axis
from grist_tools.report_html import Html, join, number, tag
from grist_train.curves import Series

BINS = 300  # a line keeps its lowest and highest point in each: about one a pixel, at every length of a run
BANDS = 72


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        color: Index of a colour, 0 to 7.
        style: `raw` (thin and pale), `line`, `dotted`, or `points` (a line with dots).
        told: Whether the values are told under the pointer.
        listed: Whether the legend has it.
    """

    label: str
    series: Series
    color: int
    style: str = "line"
    told: bool = True
    listed: bool = True


@dataclass(frozen=True)
class Mark:
    """A step worth a sign: a stage that begins (`stage`), or something bad (`bad`)."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class Chart:
    """Lines over steps.

    Attributes:
        note: What the reader has to know of the lines, after the title.
        log: Logarithmic where all values are above 0 and far apart; `always` where they are above 0.
        from_zero: Whether the axis begins at 0.
        steps: First and last step of the axis; None is where the lines begin and end.
    """

    title: str
    lines: tuple[Line, ...]
    note: str = ""
    log: str = ""
    from_zero: bool = False
    steps: tuple[int, int] | None = None


def thin(series: Series, low: float, high: float, bins: int = BINS) -> Series:
    """At most two points a bin of steps, the lowest and the highest, in order: no spike is lost, however long the run."""
    if len(series.steps) <= 2 * bins:
        return series
    import numpy as np

    values = np.array(series.values)
    at = np.clip(((np.array(series.steps) - low) / (high - low) * bins).astype(int), 0, bins - 1)
    starts = np.flatnonzero(np.diff(at, prepend=-1)).tolist()
    kept = {0, len(values) - 1}
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        part = values[start:end]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    chosen = sorted(kept)
    return Series([series.steps[i] for i in chosen], [series.values[i] for i in chosen])


def typical(line: Line) -> list[float]:
    """The values that a line's picture has to have room for: of raw ones all but one in 200 at either end, since a single
    spike would press everything else flat (a logarithmic picture has room for it)."""
    values = line.series.values
    if line.style != "raw" or len(values) < 200:
        return values
    ordered = sorted(values)
    out = len(ordered) // 200
    return [ordered[out], ordered[-1 - out]]


def path_of(steps: Sequence[float], values: Sequence[float], x: Axis, y: Axis) -> str:
    """A line through all points, as the `d` of a path."""
    points = [f"{place(x(step))} {place(y(value))}" for step, value in zip(steps, values, strict=True)]
    return "M" + "L".join(points) + ("h0" if len(points) == 1 else "")  # with a round cap, h0 is a dot


def _draw(line: Line, x: Axis, y: Axis) -> Html:
    series = thin(line.series, x.low, x.high)
    series = Series(series.steps, [min(max(value, y.low), y.high) for value in series.values])
    whole = tag("path", d=path_of(*series, x, y), class_=f"{line.style} s{line.color}")
    if line.style != "points" or len(series.steps) > 100:
        return whole
    dots = "".join(f"M{place(x(s))} {place(y(v))}h0" for s, v in zip(series.steps, series.values, strict=True))
    return join(whole, tag("path", d=dots, class_=f"dots s{line.color}"))


def _nearest(series: Series, step: float, reach: float) -> int | None:
    """Index of the point nearest to a step, None if it is further away than `reach`."""
    i = bisect_left(series.steps, step)
    near = [j for j in (i - 1, i) if 0 <= j < len(series.steps)]
    best = min(near, key=lambda j: abs(series.steps[j] - step))
    return best if abs(series.steps[best] - step) <= reach else None


def bands(lines: Sequence[Line], x: Axis, bottom: float = BOTTOM) -> list[Html]:
    """Invisible upright bands over the picture; the title of each tells the values there."""
    told = [line for line in lines if line.told and line.series.steps]
    distinct = max((len(line.series.steps) for line in told), default=1)
    n = min(BANDS, max(1, distinct))
    width, steps = (RIGHT - LEFT) / n, (x.high - x.low) / n
    out = []
    for i in range(n):
        middle = x.low + (i + 0.5) * steps
        found = [(line, j) for line in told if (j := _nearest(line.series, middle, steps)) is not None]
        if not found:
            continue
        step = min((line.series.steps[j] for line, j in found), key=lambda step: abs(step - middle))
        values = ", ".join(f"{line.label} {number(line.series.values[j])}" for line, j in found)
        title = tag("title", f"step {step:,}: {values}")
        size = {"x": place(LEFT + i * width), "y": TOP, "width": place(width), "height": place(bottom - TOP)}
        out.append(tag("rect", title, class_="band", **size))
    return out


def marks_of(marks: Sequence[Mark], x: Axis, bottom: float = BOTTOM) -> Html:
    """Stages as broken upright lines, bad steps as small signs at the upper edge; only those within the axis."""
    inside = [mark for mark in marks if x.low <= mark.step <= x.high]
    stages = [
        tag("path", tag("title", mark.text), d=f"M{place(x(mark.step))} {TOP}V{place(bottom)}", class_="stage")
        for mark in inside
        if mark.kind == "stage"
    ]
    bad = dict.fromkeys(place(x(mark.step)) for mark in inside if mark.kind == "bad")
    signs = tag("path", d="".join(f"M{at} {TOP - 8}v6" for at in bad), class_="bad") if bad else None
    return join(stages, signs)


def legend(entries: Sequence[tuple[str, str]]) -> Html | None:
    """(label, classes of its sign) as a list; nothing for none."""
    items = [tag("li", tag("span", class_=f"key {classes}"), label) for label, classes in entries]
    return tag("ul", items, class_="legend") if items else None


def figure(title: str, note: str, above: Html | None, svg: Html) -> Html:
    """A picture with its title, its legend, and a line where a script shows what is under the pointer."""
    caption = tag("figcaption", tag("h4", title), tag("p", note) if note else None)
    return tag("figure", caption, above, svg, tag("output", Html("&nbsp;")))


def draw(chart: Chart, marks: Sequence[Mark] = ()) -> Html | None:
    """A chart as a figure; None when no line has a point."""
    lines = [line for line in chart.lines if line.series.steps]
    if not lines:
        return None
    x = step_axis([chart.steps] if chart.steps else [line.series.steps for line in lines])
    every = [value for line in lines for value in line.series.values]
    shown = every if chart.log == "always" else [value for line in lines for value in typical(line)]
    y = value_axis(shown, chart.log, chart.from_zero)
    beyond = [f"{word} {number(value)}" for word, value in (("lowest", min(every)), ("highest", max(every)))]
    outside = [text for text, is_out in zip(beyond, (min(every) < y.low, max(every) > y.high), strict=True) if is_out]
    notes = [chart.note, "logarithmic" if y.log else "", f"cut off: {', '.join(outside)}" if outside else ""]
    svg = tag(
        "svg",
        frame(x, y),
        [_draw(line, x, y) for line in lines],
        marks_of(marks, x),
        bands(lines, x),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=_in_words(chart.title, lines),
    )
    entries = [(line.label, f"{line.style} s{line.color}") for line in lines if line.listed] if len(lines) > 1 else []
    return figure(chart.title, "; ".join(filter(None, notes)), legend(entries), svg)


def _in_words(title: str, lines: Sequence[Line]) -> str:
    """The picture for those who do not see it."""
    parts = []
    for line in (line for line in lines if line.told):
        steps, values = line.series
        parts.append(
            f"{line.label or 'values'} from {number(values[0])} at step {steps[0]:,} to {number(values[-1])} at step "
            f"{steps[-1]:,}, lowest {number(min(values))}, highest {number(max(values))}"
        )
    return f"{title} over steps. " + "; ".join(parts)
