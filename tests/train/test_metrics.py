"""Metrics files: a resumed run has each step once, and figures are finite."""

from __future__ import annotations

import json

import pytest
import torch

from grist_train.metrics import peak_flops, router_health, truncate_rows


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "loss": 1.0} for s in range(1, 8)] + [{"step": 6, "validation_loss": 2.0}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 8, "lo')
    truncate_rows(path, 5, last_step=9)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in kept] == [1, 2, 3, 4, 5]


def test_the_evaluation_that_ends_a_run_is_written_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 4, "validation_loss": 3.0}, {"step": 5, "loss": 1.0}, {"step": 5, "validation_loss": 2.0}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    truncate_rows(path, 5, last_step=5)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:2]


def test_no_file_is_no_error(tmp_path):
    truncate_rows(tmp_path / "none.jsonl", 5, last_step=9)
    assert not (tmp_path / "none.jsonl").exists()


def test_peak_is_measured_where_no_data_sheet_applies():
    peak, source = peak_flops(torch.device("cpu"))
    assert peak > 1e8
    assert "measured" in source


def test_health_of_a_router_by_hand():
    """Two layers of four experts: one in balance, one with a dead expert and loads 6, 2, 0, 8."""
    row = router_health([1.25, 0.5, 1.0, 0.4, *(4.0, 4.0, 4.0, 4.0), *(6.0, 2.0, 0.0, 8.0)], layers=2, experts=4)
    assert row == {
        "aux_loss": 1.25,
        "z_loss": 0.5,
        "router_entropy": pytest.approx(0.7),
        "load_max_over_mean": [1.0, 2.0],
        "load_cv": [0.0, pytest.approx(10**0.5 / 4, abs=1e-4)],
        "dead_experts": [0, 1],
    }


@pytest.mark.gpu
def test_peak_of_a_known_gpu():
    peak, source = peak_flops(torch.device("cuda", 0))
    assert peak > 1e13
    assert "data sheet" in source or "measured" in source
