"""The evaluation benchmark: a wrong result is found and not timed, rates and ratios are what they say, options are checked."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from grist_tools import bench_eval, bench_kernels
from grist_tools.bench_eval import OURS, TOLERANCE_NATS, differing, main, over_all, race, results_table
from grist_tools.bench_eval_rows import invented_rows

PAIRS = [("a", " b"), ("a", " c")]
RIGHT = [(-1.0, True), (-2.5, False)]
SMALL = ["--layers", "1", "--width", "64", "--vocab-size", "2048", "--rows", "3", "--patience", "0"]


@pytest.fixture(autouse=True)
def a_quiet_machine(monkeypatch):
    """Its clock stands still, so nothing is known about others."""
    monkeypatch.setattr(bench_eval, "usage", lambda: None)
    monkeypatch.setattr(bench_eval, "wait_until_quiet", lambda until: True)


@pytest.fixture
def clock(monkeypatch):
    """A clock that contestants move: a list with its seconds."""
    now = [0.0]
    monkeypatch.setattr(bench_eval.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench_eval.time, "process_time", lambda: 2 * now[0])
    return now


def taking(clock, seconds, result=RIGHT):
    paces = iter(seconds)

    def score(pairs):
        clock[0] += next(paces)
        return result

    return score


def test_rates_are_of_the_median_and_ratios_to_the_fastest(clock):
    found = {
        OURS: taking(clock, [9, 1, 5, 2]),  # the first is the check
        "lm_eval hf, batch 1": taking(clock, [9, 20, 20, 20]),
        "lm_eval hf, batch 16": taking(clock, [8, 6, 10]),
    }
    rows = {row["who"]: row for row in race(found, PAIRS, 10, 3, 0.0)}
    assert rows[OURS]["value"] == pytest.approx(10 / 2)
    assert rows[OURS]["ratio"] == pytest.approx(8 / 2)
    assert rows["lm_eval hf, batch 1"]["ratio"] == pytest.approx(8 / 20)
    assert (rows[OURS]["lowest_seconds"], rows[OURS]["highest_seconds"]) == (1, 5)
    assert rows[OURS]["cpu_seconds"] == pytest.approx(4)
    assert rows[OURS]["cpu_ratio"] == pytest.approx(4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            [(-1.0, True), (-2.5 - 2 * TOLERANCE_NATS, False)],
            "pair 1 is (-2.5040, False), but lm_eval has (-2.5000, False)",
        ),
        ([(-1.0, False), (-2.5, False)], "pair 0 is (-1.0000, False), but lm_eval has (-1.0000, True)"),
        ([(float("nan"), True), (-2.5, False)], "pair 0 is (nan, True)"),
    ],
)
def test_a_wrong_result_is_named_and_nothing_is_timed(clock, wrong, message):
    found = {OURS: taking(clock, [1], wrong), "lm_eval hf, batch 1": taking(clock, [1])}
    rows = [{"model": "dense", "task": "piqa", "shots": 0, **row} for row in race(found, PAIRS, 10, 3, 0.0)]
    assert len(rows) == 1
    assert message in rows[0]["wrong"]
    assert message in results_table(rows)
    assert over_all(rows, 10) == []
    assert differing(RIGHT, [(-1.0 + TOLERANCE_NATS / 2, True), RIGHT[1]]) is None


def test_over_all_tasks_time_is_added_up():
    rows = [
        {"who": who, "ok": True, "seconds": seconds, "cpu_seconds": 2 * seconds}
        for who, seconds in [(OURS, 1.0), ("a", 3.0), ("b", 2.0), (OURS, 2.0), ("a", 2.0), ("b", 4.0)]
    ]
    found = {row["who"]: row for row in over_all(rows, 30)}
    assert found[OURS]["value"] == pytest.approx(60 / 3)
    assert found[OURS]["ratio"] == pytest.approx(5 / 3)
    assert (found[OURS]["target"], found[OURS]["reached"]) == (bench_eval.TARGET, False)
    assert "target" not in found["a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "dense,mamba"], "--models must be some of dense, moe, but has mamba"),
        (["--tasks", "piqa,chess"], "each perhaps with :N, but has 'chess'"),
        (["--tasks", "piqa:x"], "each perhaps with :N, but has 'piqa:x'"),
        (["--batch-sizes", "0"], "--batch-sizes must be whole numbers above 0, but is '0'"),
        (["--rows", "0"], "--rows must be at least 1, but is 0"),
        (["--width", "100"], "--width must be a multiple of 64, but is 100"),
    ],
)
def test_bad_options_are_named(tmp_path, capsys, arguments, message):
    out = tmp_path / "out.json"
    assert main([*SMALL, "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_rows_are_the_same_for_a_seed_and_however_many_there_are():
    assert invented_rows("hellaswag", 3) == invented_rows("hellaswag", 9)[:3]
    assert invented_rows("hellaswag", 3, seed=1) != invented_rows("hellaswag", 3)


@pytest.mark.clients
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval: pip install 'lm_eval[hf]'")
def test_command_line_prints_a_table_and_writes_the_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_kernels, "commit", lambda: "abc")
    out = tmp_path / "out.json"
    arguments = [*SMALL, "--tasks", "piqa,mmlu:1", "--repetitions", "1", "--batch-sizes", "2", "--out", str(out)]
    assert main(arguments) == 0
    assert "reached" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert {"device", "versions", "date", "commit", "threads", "command", "how"} <= report.keys()
    assert report["versions"]["lm_eval"]
    assert [(row["model"], row["task"]) for row in report["results"]] == [
        (model, task) for model in ("dense", "moe") for task in ("piqa", "piqa", "mmlu", "mmlu", "all", "all")
    ]
