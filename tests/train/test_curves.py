"""Curves: what is read from metrics.jsonl, and that a picture with the right panels comes out."""

from __future__ import annotations

import json
import math
import struct
from statistics import fmean

import numpy as np
import pytest
from matplotlib.figure import Figure

from grist_train.curves import PANELS, plot, read_metrics, smooth


def training_row(step: int, **more) -> dict:
    row = {"step": step, "loss": 5.0 / step, "grad_norm": 1.0 + step, "lr": 1e-3, "tokens_per_second": 1e4}
    return row | more


def router_row(step: int) -> dict:
    health = {"load_max_over_mean": [1.5, 2.5], "load_cv": [0.2, 0.4], "router_entropy": 1.2, "dead_experts": [0, 1]}
    return training_row(step, **health)


def costly_row(step: int) -> dict:
    times = {f"time_{part}_ms": 10.0 * step + i for i, part in enumerate(("data", "forward", "backward", "optimizer"))}
    return router_row(step) | times | {"memory_allocated_gib": 2.0 + step, "memory_resident_gib": 1.0 + step}


def evaluation_row(step: int, bits: float = 2.0) -> dict:
    return {"step": step, "validation_loss": 3.0, "validation_bits_per_byte": bits, "seconds": 1.0}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def png_size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_rows_are_split_by_kind_and_a_list_is_reduced(tmp_path):
    metrics = read_metrics(write(tmp_path / "m.jsonl", [router_row(1), router_row(2), evaluation_row(2)]))
    assert metrics.series("loss").values == [5.0, 2.5]
    assert metrics.series("validation_bits_per_byte") == ([2], [2.0])
    assert metrics.series("load_max_over_mean").values == [2.0, 2.0]
    assert metrics.series("load_max_over_mean", max).values == [2.5, 2.5]


def test_a_repeated_step_counts_once_and_the_later_row_wins(tmp_path):
    rows = [training_row(1), training_row(2, loss=9.0), training_row(3, loss=9.0), training_row(2), training_row(3)]
    metrics = read_metrics(write(tmp_path / "m.jsonl", rows))
    assert metrics.series("loss") == ([1, 2, 3], [5.0, 2.5, 5.0 / 3])


def test_non_finite_values_leave_a_gap(tmp_path):
    metrics = read_metrics(write(tmp_path / "m.jsonl", [training_row(1), training_row(2, loss=math.nan)]))
    assert metrics.series("loss").steps == [1]


def test_a_torn_line_is_named_and_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(training_row(1)) + "\n" + '{"step": 2, "lo')
    with pytest.warns(UserWarning, match=r"m\.jsonl:2: left out"):
        assert len(read_metrics(path).training) == 1


def test_a_file_without_rows_is_refused(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="no metrics to draw"):
        read_metrics(path)
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "absent.jsonl")


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    smoothed = smooth([1.0, 2.0], weight=0.5)
    assert smoothed == pytest.approx([1.0, (0.5 * 0.5 * 1 + 0.5 * 2) / 0.75])


def test_nine_panels_become_a_grid_of_three_rows(tmp_path):
    path = write(tmp_path / "m.jsonl", [router_row(1), router_row(2), evaluation_row(2)])
    out = plot(path, tmp_path / "deep" / "curves.png")
    assert png_size(out) == (1782, 1188)  # 3 columns of 5.4 inches, 3 rows of 3.6 inches, 110 dots an inch
    assert [file.name for file in out.parent.iterdir()] == ["curves.png"]  # no temporary file stays


def test_every_panel_draws_what_it_is_named_after(tmp_path):
    """The router's health among them: busiest expert, variation of the load, entropy, dead experts."""
    metrics = read_metrics(
        write(tmp_path / "m.jsonl", [*(costly_row(step) for step in range(1, 9)), evaluation_row(8)])
    )
    for draw, key in PANELS:
        axes = Figure().add_subplot()
        draw(axes, metrics, "C0", "run")
        drawn = [np.asarray(line.get_ydata()).tolist() for line in axes.lines]
        over_layers = sum if key == "dead_experts" else fmean
        assert metrics.series(key, over_layers).values in drawn, key
        assert axes.get_title(), key


def test_a_dense_run_has_no_panels_of_the_router(tmp_path):
    rows = [{"step": 1, "loss": 2.0, "lr": 1e-3}]
    assert png_size(plot(write(tmp_path / "m.jsonl", rows), tmp_path / "c.png")) == (1188, 396)


def test_several_runs_share_the_panels(tmp_path):
    first = write(tmp_path / "a.jsonl", [training_row(step) for step in range(1, 5)])
    second = write(tmp_path / "b.jsonl", [training_row(step, loss=1.0) for step in range(1, 9)])
    together = plot({"a": first, "b": second}, tmp_path / "both.png")
    alone = plot(first, tmp_path / "alone.png")
    assert png_size(together) == png_size(alone)
    assert together.read_bytes() != alone.read_bytes()
    with pytest.raises(ValueError, match="no run to draw"):
        plot({}, tmp_path / "none.png")
