from __future__ import annotations

import random
import re

import pytest

from grist_tools.report_axis import BOTTOM, LEFT, RIGHT, TOP, log_ticks, short, step_axis, ticks, value_axis
from grist_tools.report_chart import Chart, Line, Mark, draw, thin
from grist_train.curves import Series


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (2.31, 2.33), (1e-6, 4e-6), (0, 99_999), (5, 6)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    step = found[1] - found[0]
    assert all(low - 1e-6 * step <= value <= high + 1e-6 * step for value in found)
    assert f"{step:.0e}"[0] in "125"


@pytest.mark.parametrize(("low", "high"), [(0.1, 40), (1e-9, 1e9), (2.1, 2.4), (0.9, 1.1)])
def test_logarithmic_ticks_are_few_and_inside(low, high):
    found = log_ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9) for value in found)


@pytest.mark.parametrize(("value", "text"), [(20_000, "20k"), (0.004, "0.004"), (0, "0"), (1500, "1500"), (3e6, "3M")])
def test_numbers_beside_an_axis_are_short(value, text):
    assert short(value) == text


@pytest.mark.parametrize("log", ["", "wide", "always"])
@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [-1.0, 3.0], [1e-3, 1e3], [2.0, 2.5]])
def test_an_axis_holds_its_values_and_goes_upwards(values, log):
    y = value_axis(values, log)
    places = [y(value) for value in sorted(values)]
    assert all(TOP <= place <= BOTTOM for place in places)
    assert places == sorted(places, reverse=True)
    assert y.log == (min(values) > 0 and (log == "always" or (log == "wide" and max(values) > 10 * min(values))))


def test_an_axis_from_zero_begins_there():
    assert value_axis([3.0, 4.0], from_zero=True)(0) == BOTTOM


def test_a_single_step_stands_in_the_middle():
    assert step_axis([[7]])(7) == pytest.approx((step_axis([[7]])(6) + step_axis([[7]])(8)) / 2)


def test_thinning_keeps_both_ends_and_every_spike():
    random.seed(1)
    n = 50_000
    values = [random.random() for _ in range(n)]
    for place in (1, 777, 31_234, n - 2):
        values[place] = -50.0 if place == 777 else 100.0 + place
    kept = thin(Series(list(range(n)), values), 0, n - 1)
    assert len(kept.steps) <= 602
    assert kept.steps == sorted(set(kept.steps))
    assert (kept.steps[0], kept.steps[-1]) == (0, n - 1)
    assert {1, 777, 31_234, n - 2} <= set(kept.steps)
    assert all(values[step] == value for step, value in zip(*kept, strict=True))


def test_thinning_leaves_a_short_line_alone():
    series = Series(list(range(600)), [1.0] * 600)
    assert thin(series, 0, 599) is series


def test_a_spike_is_cut_off_and_said():
    n = 1000
    values = [2.0 + 0.001 * (step % 10) for step in range(n)]
    values[500] = 1e6
    drawn = draw(Chart("Loss", (Line("raw", Series(list(range(n)), values), 0, "raw"),)))
    assert drawn is not None
    assert "cut off: highest 1,000,000" in drawn
    path = re.search(r'd="M([^"]*)" class="raw s0"', drawn)
    assert path is not None
    ys = [float(point.split()[1]) for point in path.group(1).split("L")]
    assert min(ys) == TOP
    assert sum(y == TOP for y in ys) == 1


def test_every_place_tells_the_values_there():
    lines = (Line("a", Series([1, 2, 3], [1.5, 2.5, 3.5]), 0), Line("b", Series([3], [9.0]), 1, "points"))
    drawn = draw(Chart("Loss", lines), [Mark(2, "stage", "a stage begins"), Mark(3, "bad", ""), Mark(9, "bad", "")])
    assert drawn is not None
    assert "step 1: a 1.5<" in drawn
    assert "step 3: a 3.5, b 9<" in drawn
    assert "a from 1.5 at step 1 to 3.5 at step 3, lowest 1.5, highest 3.5" in drawn
    assert drawn.count('class="stage"') == drawn.count('class="bad"') == 1
    assert drawn.split('class="bad"')[0].rsplit('d="', 1)[1].count("M") == 1, "a mark outside the axis is drawn"


def test_nothing_to_draw_draws_nothing():
    assert draw(Chart("Loss", (Line("a", Series([], []), 0),))) is None


def test_one_axis_of_steps_for_all():
    short_line = Line("a", Series([90, 100], [1.0, 2.0]), 0)
    drawn = draw(Chart("Loss", (short_line,), steps=(0, 100)))
    assert drawn is not None
    path = re.search(r'd="M([\d.]+) [^"]*" class="line s0"', drawn)
    assert path is not None
    assert float(path.group(1)) == pytest.approx(LEFT + 0.9 * (RIGHT - LEFT), abs=0.1)
