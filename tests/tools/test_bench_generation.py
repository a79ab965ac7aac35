"""The generation benchmark: wrong text is found and not timed, times are what they say, results are written down."""

from __future__ import annotations

import json

import pytest

from grist_tools import bench_generation, bench_kernels
from grist_tools.bench_generation import main, race, results_table
from grist_tools.bench_generation_peers import BASE, OURS, Text, contestants
from grist_tools.quiet import Usage

PROMPT = [3, 1, 4]
SMALL = ["--layers", "2", "--width", "64", "--vocab-size", "50", "--prompt", "7", "--new", "5", "--patience", "0"]


@pytest.fixture(autouse=True)
def a_quiet_machine(monkeypatch):
    """Its clock stands still, so nothing is known about others."""
    monkeypatch.setattr(bench_generation, "usage", lambda: None)
    monkeypatch.setattr(bench_generation, "wait_until_quiet", lambda until: True)


def writing(ids: list[int], first: float, step: float):
    return lambda prompt, count: Text(ids[:count], [first + step * i for i in range(count)])


def test_rates_and_ratios_are_those_of_the_median():
    paces = iter([9.0, 9.0, 2.0, 4.0, 3.0])  # the first is the check
    rows = race(
        {BASE: writing([5, 6, 7], 3.0, 1.5), OURS: lambda prompt, count: writing([5, 6, 7], next(paces), 0.5)(prompt, count)},
        PROMPT, 3, 4, 0.0,
    )  # fmt: skip
    found = {(row["what"], row["who"]): row for row in rows}
    assert found["prefill", OURS]["ms"] == pytest.approx(3500)  # the middle of 9, 2, 4 and 3
    assert found["prefill", OURS]["value"] == pytest.approx(3 / 3.5)
    assert found["prefill", OURS]["ratio"] == pytest.approx(3 / 3.5)
    assert found["decode", OURS]["value"] == pytest.approx(2)
    assert found["decode", OURS]["ratio"] == pytest.approx(3)
    assert found["decode", BASE]["ratio"] == 1
    assert (found["decode", OURS]["lowest_ms"], found["prefill", OURS]["highest_ms"]) == (500, 9000)


def test_another_text_is_wrong_and_not_timed():
    calls = []

    def wrong(prompt, count):
        calls.append(count)
        return Text([5, 8, 7], [1.0, 2.0, 3.0])

    rows = race({BASE: writing([5, 6, 7], 3.0, 1.5), OURS: wrong}, PROMPT, 3, 4, 0.0)
    ours = [bench_generation.judged(row, "dense") for row in rows if row["who"] == OURS]
    assert calls == [3]
    assert all(row["wrong"] == f"id 1 is 8, but {BASE} has 6" for row in ours)
    assert "id 1 is 8" in results_table(ours)


def test_disturbed_repetitions_do_not_count(monkeypatch):
    cores = iter([1.0, 0.0, 1.0, 0.0])  # of others, repetition by repetition
    spent = iter(reading for busy in cores for reading in (Usage(0, 0, 0), Usage(1, busy, 0)))
    monkeypatch.setattr(bench_generation, "usage", lambda: next(spent))
    paces = iter([1.0, 100.0, 2.0, 100.0, 4.0])
    rows = race({BASE: lambda prompt, count: writing([5, 6], next(paces), 1.0)(prompt, count)}, PROMPT, 2, 4, 0.0)
    assert rows[0]["ms"] == pytest.approx(3000)
    assert (rows[0]["quiet"], rows[0]["repetitions"]) == (2, 4)


def test_one_that_was_disturbed_is_repeated_while_there_is_time(monkeypatch):
    spent = iter(reading for busy in (1.0, 1.0, 0.0) for reading in (Usage(0, 0, 0), Usage(1, busy, 0)))
    monkeypatch.setattr(bench_generation, "usage", lambda: next(spent))
    rows = race({BASE: writing([5, 6], 3.0, 1.0)}, PROMPT, 2, 1, float("inf"))
    assert (rows[0]["quiet"], rows[0]["repetitions"]) == (1, 1)
    assert next(spent, None) is None


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_all_write_one_text_and_tell_when(kind):
    pytest.importorskip("transformers")
    texts = {name: write(PROMPT, 6) for name, write in contestants(kind, 2, 64, 50, 16).items()}
    assert list(texts) == [OURS, BASE, "transformers, dynamic cache"]
    assert len({tuple(text.ids) for text in texts.values()}) == 1
    for text in texts.values():
        assert len(text.seconds) == len(text.ids) == 6
        assert 0 < text.seconds[0] <= text.seconds[-1]
        assert text.seconds == sorted(text.seconds)


def test_command_line_prints_a_table_and_writes_the_numbers(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench_kernels, "commit", lambda: "abc")
    out = tmp_path / "out.json"
    assert main([*SMALL, "--repetitions", "2", "--out", str(out)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 15
    report = json.loads(out.read_text())
    assert {"device", "versions", "date", "commit", "threads", "command", "how"} <= report.keys()
    assert report["versions"]["transformers"]
    assert [row["model"] for row in report["rows"]] == ["dense"] * 6 + ["moe"] * 6
    judged = {(row["model"], row["what"]): row["target"] for row in report["rows"] if row["who"] == OURS}
    assert judged == bench_generation.TARGETS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "dense,mamba"], "--models must be some of dense, moe, but has mamba"),
        (["--repetitions", "0"], "--repetitions must be at least 1, but is 0"),
        (["--width", "100"], "--width must be a multiple of 64, but is 100"),
    ],
)
def test_bad_options_are_named(tmp_path, capsys, arguments, message):
    out = tmp_path / "out.json"
    assert main([*SMALL, "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
