"""The launch tables are what the formulas and the measurements say, and a candidate has to earn its place."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch

from grist_kernels import OPS, launch

pytest.importorskip("triton", reason="formulas are in Triton kernels' files")

import interpreter_shim
from triton.runtime.errors import OutOfResources

from grist_kernels import backend
from grist_kernels.cases import run
from grist_kernels.launch import Config
from grist_tools import tune_kernels, tune_kernels_measure
from grist_tools.bench_kernels_case import error_ratio
from grist_tools.timing import Timing
from grist_tools.tune_kernels_measure import Bench, bench, best, tune_size

TABLES = [op for op in OPS if launch.table_path(op).exists()]
MEASURED = "NVIDIA H200, 2026-11-21, triton 3.6.0"
FORMULA = {"BLOCK": 64, "num_warps": 4}


def row(kernel: str, size: int, block: int, source: str = "formula") -> tune_kernels.Row:
    key = {"kernel": kernel, "architecture": "sm_90", "dtype": "bfloat16", "size": size}
    return {**key, "config": {"BLOCK": block, "num_warps": 4}, "source": source}


# Tables.


def test_the_committed_tables_are_up_to_date(tmp_path):
    assert len(TABLES) >= 4
    assert tune_kernels.main(["--formula", "--into", str(tmp_path)]) == 0
    for op in TABLES:
        fresh = (tmp_path / op / "launch_table.json").read_text(encoding="utf-8")
        assert fresh == launch.table_path(op).read_text(encoding="utf-8"), (
            f"{op}: a formula or its sizes changed; renew the table: python -m grist_tools.tune_kernels --formula"
        )


@pytest.mark.parametrize("op", TABLES)
def test_tables_are_complete(op):
    module = backend.triton_kernel(op)
    wanted = {
        (kernel, architecture, dtype, size)
        for kernel in module.FORMULAS
        for architecture in launch.ARCHITECTURES
        for dtype in launch.TABLE_DTYPE.values()
        for size in module.SIZES
    }
    keys = [tune_kernels.key(found) for found in launch.table(op)]
    assert len(keys) == len(set(keys))
    assert set(keys) == wanted


def test_measurements_are_kept_until_measured_again():
    formulas = [row("forward", 64, 1), row("forward", 128, 2), row("forward", 256, 3)]
    before = [row("forward", 64, 10, MEASURED), row("forward", 128, 20, MEASURED), row("forward", 256, 30)]
    measured = [row("forward", 128, 200, MEASURED)]
    assert tune_kernels.merged(formulas, before, measured) == [before[0], measured[0], formulas[2]]


def test_measurements_of_what_is_gone_are_dropped():
    before = [row("forward", 64, 10, MEASURED), row("sideways", 64, 10, MEASURED), row("forward", 32, 10, MEASURED)]
    assert tune_kernels.merged([row("forward", 64, 1)], before, []) == [before[0]]


def test_a_table_has_a_line_for_each_row():
    rows = [row("forward", 64, 1), row("forward", 128, 2)]
    text = tune_kernels.table_text(rows)
    assert json.loads(text) == {"rows": rows}
    assert [line.rstrip(",") for line in text.splitlines()[1:-1]] == [json.dumps(each) for each in rows]


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = tune_kernels.write_table("rms_norm", [], tmp_path)
    before = path.read_bytes()

    def fail(rows):
        raise OSError("no")

    monkeypatch.setattr("os.replace", lambda *paths: fail(paths))
    with pytest.raises(OSError, match="no"):
        tune_kernels.write_table("rms_norm", [], tmp_path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# Choice.


def clock(milliseconds: dict[int, list[float]]):
    """A timer that gives each BLOCK its times one after the other, the last one for ever."""

    def time_ms(config: Config) -> float:
        times = milliseconds[config["BLOCK"]]
        return times.pop(0) if len(times) > 1 else times[0]

    return time_ms


CANDIDATES = [{"BLOCK": block, "num_warps": 4} for block in (32, 64, 128)]


@pytest.mark.parametrize(
    ("milliseconds", "block", "ratio"),
    [
        ({32: [0.9], 64: [1.0], 128: [0.8]}, 128, 0.8),
        ({32: [0.99], 64: [1.0], 128: [1.5]}, 64, 1.0),  # faster, but by less than the margin
        ({32: [0.9, 1.0], 64: [1.0], 128: [0.95]}, 64, 1.0),  # lucky once
        ({32: [math.inf], 64: [1.0], 128: [math.inf]}, 64, 1.0),  # nothing else runs
        ({32: [math.inf], 64: [1.0], 128: [0.5]}, 128, 0.5),
    ],
)
def test_the_fastest_wins_if_it_is_worth_it(milliseconds, block, ratio):
    config, found = best(FORMULA, CANDIDATES, clock(milliseconds))
    assert config["BLOCK"] == block
    assert found == pytest.approx(ratio)


def test_the_formula_alone_is_the_best():
    assert best(FORMULA, [], clock({64: [1.0]})) == (FORMULA, 1.0)
    assert best(FORMULA, [dict(FORMULA)], clock({64: [1.0]})) == (FORMULA, 1.0)


def test_a_formula_that_fails_stops_the_tuning():
    with pytest.raises(ValueError, match="does not run or gives a wrong result"):
        best(FORMULA, CANDIDATES, clock({32: [1.0], 64: [math.inf], 128: [1.0]}))


# Measuring: interpreted, with a clock of our own.

interpreted = pytest.mark.skipif(not backend.INTERPRETING, reason="needs TRITON_INTERPRET=1")


@pytest.fixture
def small(monkeypatch) -> Iterator[Bench]:
    """rms_norm at width 64, compared on few rows, timed by the number of rows that a program takes (its ROWS)."""

    def timed(calls, device, budget_ms, rounds):
        (config,) = launch._forced.values()
        return {name: Timing(100.0 / config["ROWS"], 0.0, 0.0, 1) for name in calls}

    interpreter_shim.install()
    monkeypatch.setattr(tune_kernels_measure, "alternate", timed)
    monkeypatch.setattr(tune_kernels_measure, "CHECK_ROWS", 6)
    with backend.using("triton"):
        yield bench("rms_norm", torch.float32, 64, rows=8, budget_ms=1.0, device="cpu")


def candidates(monkeypatch, **by_kernel: list[int]) -> None:
    def of(blocks: list[int], formula):
        return lambda where, dtype, size: [{**formula(where, dtype, size), "ROWS": rows} for rows in blocks]

    module = backend.triton_kernel("rms_norm")
    found = {kernel: of(rows, module.FORMULAS[kernel]) for kernel, rows in by_kernel.items()}
    monkeypatch.setattr(module, "CANDIDATES", found, raising=False)


@interpreted
def test_a_size_is_tuned_for_each_kernel_with_candidates(small, monkeypatch):
    candidates(monkeypatch, forward=[16, 64], backward=[4])
    forward, backward = sorted(tune_size(small, 64), key=lambda row: row["kernel"], reverse=True)
    assert (forward["kernel"], forward["config"]["ROWS"]) == ("forward", 64)
    assert backward["config"] == backend.triton_kernel("rms_norm").FORMULAS["backward"](
        launch.INTERPRETER, torch.float32, 64
    )
    assert {key: forward[key] for key in ("architecture", "dtype", "size")} == {
        "architecture": "sm_90", "dtype": "float32", "size": 64,
    }  # fmt: skip
    assert launch._forced == {}
    assert small.wrong == 0


@interpreted
def test_a_wrong_candidate_is_never_timed(small, monkeypatch, capsys):
    candidates(monkeypatch, forward=[64])

    def error(got, wanted):
        return 3.0 if launch._forced["rms_norm", "forward"]["ROWS"] == 64 else error_ratio(got, wanted)

    monkeypatch.setattr(tune_kernels_measure, "error_ratio", error)
    (forward,) = tune_size(small, 64)
    assert forward["config"]["ROWS"] != 64
    assert small.wrong == 1
    assert "WRONG forward" in capsys.readouterr().err


@interpreted
def test_a_candidate_that_does_not_fit_is_passed_over(small, monkeypatch, capsys):
    candidates(monkeypatch, forward=[64])

    def check(door, arguments, gradients):
        if launch._forced and launch._forced["rms_norm", "forward"]["ROWS"] == 64:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return run(door, arguments, gradients)

    monkeypatch.setattr(tune_kernels_measure, "run", check)
    (forward,) = tune_size(small, 64)
    assert forward["config"]["ROWS"] != 64
    assert small.wrong == 0
    assert "does not fit" in capsys.readouterr().err


@interpreted
def test_the_call_that_launches_a_kernel_is_timed(small, monkeypatch):
    (directions,) = small.timed
    call = tune_kernels_measure._call_with
    assert call("forward", directions, "rms_norm") is directions["forward"]
    assert call("backward", directions, "rms_norm") is directions["backward"]
    assert call("sideways", directions, "rms_norm") is None
    with pytest.raises(ValueError, match="no timed call of rms_norm launches sideways"):
        small.time_ms("sideways", {})
    monkeypatch.setattr(tune_kernels_measure, "BY_DIFFERENCE", {"rms_norm"})
    assert call("forward", directions, "rms_norm") is directions["forward_backward"]


@interpreted
def test_rows_are_tuned_whatever_function_they_launch(small):
    """A narrow window has rows of its own for the kernels of every attention."""
    of_attention = bench("attention", torch.float32, 64, rows=8, budget_ms=1.0, device="cpu")
    assert of_attention.kernels() == set(backend.triton_kernel("attention").CANDIDATES)


# The command.


def test_wrong_options_are_refused(capsys, monkeypatch):
    assert tune_kernels.main(["--ops", "sideways"]) == 2
    assert "no launch table for sideways" in capsys.readouterr().err
    assert tune_kernels.main(["--dtypes", "float64"]) == 2
    assert "no rows for type(s) float64" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune_kernels.main([]) == 2
    assert "--formula needs none" in capsys.readouterr().err


def test_a_gpu_without_rows_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with launch.assuming(launch.Target("sm_75", 40)), pytest.raises(ValueError, match="this GPU is sm_75"):
        tune_kernels.check_can_measure()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="interpreted"):
        tune_kernels.check_can_measure()


@pytest.mark.parametrize("wrong", [0, 2])
def test_measurements_are_written_with_their_source(tmp_path, monkeypatch, wrong):
    module = backend.triton_kernel("rms_norm")
    size = module.SIZES[0]
    config = {**module.FORMULAS["forward"](launch.INTERPRETER, torch.bfloat16, size), "num_warps": 2}
    measured = {**row("forward", size, 0, MEASURED), "config": config}
    monkeypatch.setattr(tune_kernels, "check_can_measure", lambda: None)
    monkeypatch.setattr(tune_kernels_measure, "tune", lambda *options: ([measured], wrong))
    assert tune_kernels.main(["--ops", "rms_norm", "--into", str(tmp_path)]) == bool(wrong)
    rows = json.loads((tmp_path / "rms_norm" / "launch_table.json").read_text(encoding="utf-8"))["rows"]
    assert measured in rows
    assert len(rows) == len(tune_kernels.formula_rows("rms_norm"))
