"""Schedules: their corners, and that they never leave [0, 1]."""

from __future__ import annotations

import pytest

from grist_train.config import ScheduleConfig
from grist_train.schedule import multiplier


def curve(steps: int = 100, **settings) -> list[float]:
    return [multiplier(step, steps, ScheduleConfig(**settings)) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warmup_is_linear_and_values_stay_in_range(kind):
    values = curve(kind=kind, warmup_steps=10, decay_fraction=0.3)
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(0.0 <= value <= 1.0 for value in values)


def test_wsd_holds_then_falls_to_nearly_nothing():
    values = curve(kind="wsd", warmup_steps=10, decay_fraction=0.2)
    assert values[10:80] == [1.0] * 70
    assert values[80:] == pytest.approx([1 - i / 20 for i in range(20)])


def test_cosine_ends_at_its_final_fraction():
    values = curve(steps=1000, kind="cosine", warmup_steps=0, final_fraction=0.1)
    assert values[0] == 1.0
    assert values[500] == pytest.approx(0.55, abs=1e-6)
    assert values[-1] == pytest.approx(0.1, abs=1e-4)


def test_a_line_falls_from_the_warmup_to_the_final_fraction():
    values = curve(steps=110, kind="linear", warmup_steps=10, final_fraction=0.2)
    assert values[10:] == pytest.approx([1.0 - 0.8 * i / 100 for i in range(100)])


def test_wsd_with_a_root_falls_steeply_first_and_ends_where_a_line_does():
    line, root = (
        curve(warmup_steps=0, decay_fraction=0.25, final_fraction=0.1, decay_shape=s) for s in ("linear", "1-sqrt")
    )
    assert root[:76] == [1.0] * 76
    assert root[75:] == pytest.approx([1.0 - 0.9 * (i / 25) ** 0.5 for i in range(25)])
    assert all(below < above for below, above in zip(root[76:], line[76:], strict=True))
    assert multiplier(100, 100, ScheduleConfig(decay_shape="1-sqrt", final_fraction=0.1)) == pytest.approx(0.1)


def test_constant_stays():
    assert set(curve(kind="constant", warmup_steps=0)) == {1.0}


def test_warmup_longer_than_the_run_is_no_error():
    assert max(curve(steps=5, kind="cosine", warmup_steps=50)) <= 0.1
