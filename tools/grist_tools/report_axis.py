"""The axes of the report's pictures: values to coordinates, round ticks, grid lines.

Lengths are in units of the view box, which is about a CSS pixel on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from grist_tools.report_html import Html, join, tag

WIDTH, HEIGHT = 400, 216
LEFT, RIGHT, TOP, BOTTOM = 50, 392, 10, 190
_UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Axis:
    """Values to coordinates.

    Attributes:
        low, high: Values at `start` and `end`; equal ones are not allowed, nor is a `low` below 0 when `log`.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def ticks(low: float, high: float, n: int = 4) -> list[float]:
    """About n round values (1, 2 or 5 times a power of ten apart) in [low, high]."""
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], every so many that at most six remain; round values between them when few fit."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = [10.0**i for i in range(first, last + 1, max(1, math.ceil((last - first + 1) / 6)))]
    if len(powers) > 2:
        return powers
    between = [m * 10.0**i for i in range(first - 1, last + 1) for m in (1, 2, 5) if low <= m * 10.0**i <= high]
    return between if len(between) > 1 else ticks(low, high)


def short(value: float) -> str:
    """A number beside an axis: `20k`, `0.004`, `1e-06`."""
    for size, unit in _UNITS:
        if abs(value) >= size * (10 if unit == "k" else 1):
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def place(value: float) -> str:
    return f"{round(value, 1):g}"


def step_axis(steps: Sequence[Sequence[int]]) -> Axis:
    """The axis that holds all of these ascending steps; a single one stands in the middle."""
    low, high = min(each[0] for each in steps), max(each[-1] for each in steps)
    return Axis(low, high, LEFT, RIGHT) if high > low else Axis(low - 1, high + 1, LEFT, RIGHT)


def value_axis(values: Sequence[float], log: str = "", from_zero: bool = False) -> Axis:
    """The axis that holds all values, with a little room."""
    low, high = min(values), max(values)
    if low > 0 and (log == "always" or (log and high > 10 * low)):
        room = max((high / low) ** 0.04, 1.05)
        return Axis(low / room, high * room, BOTTOM, TOP, log=True)
    low = min(low, 0.0) if from_zero else low
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return Axis(low if from_zero and low == 0 else low - room, high + room, BOTTOM, TOP)


def frame(x: Axis, y: Axis | None, label: str = "step", bottom: float = BOTTOM) -> Html:
    """Grid lines, ticks and their numbers; without `y` only those of the steps."""
    values = [] if y is None else log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high)
    lines, texts = [], []
    for value in values:
        at = y(value) if y is not None else 0
        lines.append(f"M{LEFT} {place(at)}H{RIGHT}")
        texts.append(tag("text", short(value), x=LEFT - 5, y=place(at + 4), text_anchor="end"))
    steps = [step for step in ticks(x.low, x.high) if step == int(step)]
    for step in steps:
        at = x(step)
        lines.append(f"M{place(at)} {place(bottom)}v4")
        near_the_end = at > RIGHT - 14
        anchor = "end" if near_the_end else "middle"
        texts.append(tag("text", short(step), x=place(at), y=place(bottom + 16), text_anchor=anchor))
    texts.append(tag("text", label, x=LEFT - 5, y=place(bottom + 16), text_anchor="end", class_="axis"))
    base = tag("path", d=f"M{LEFT} {place(bottom)}H{RIGHT}", class_="base")
    return join(tag("path", d="".join(lines), class_="grid"), base, texts)
