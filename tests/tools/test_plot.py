from __future__ import annotations

import json
from pathlib import Path

import pytest

from grist_tools.plot import labels, main


def run_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    rows = [{"step": step, "loss": 4.0 / step, "lr": 1e-3} for step in range(1, 4)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_run_gets_its_curves_beside_the_metrics(tmp_path, capsys):
    run = run_folder(tmp_path / "quick")
    assert main([str(run)]) == 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == str(run / "curves.png")


def test_several_runs_go_into_one_picture(tmp_path):
    first, second = run_folder(tmp_path / "x" / "same"), run_folder(tmp_path / "y" / "same")
    out = tmp_path / "both.png"
    assert main([str(first), str(second / "metrics.jsonl"), "--out", str(out)]) == 0
    assert out.is_file()


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [run_folder(tmp_path / parent / "same") / "metrics.jsonl" for parent in ("x", "y")]
    assert list(labels(paths)) == ["x/same", "y/same"]
    assert list(labels(paths[:1])) == ["same"]


@pytest.mark.parametrize("arguments", [["absent"], ["{run}", "{run}"]])
def test_bad_input_is_told_and_fails(tmp_path, capsys, arguments):
    run = run_folder(tmp_path / "quick")
    assert main([argument.format(run=run) for argument in arguments]) == 2
    assert capsys.readouterr().err.startswith("plot: ")
    assert not (run / "curves.png").exists()
