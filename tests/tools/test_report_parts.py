from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from report_runs import Page, full_run, row, write_rows

from grist_tools.report_axis import step_axis
from grist_tools.report_cells import COLUMNS, cells
from grist_tools.report_files import bad_batches, stages
from grist_tools.report_heat import STRIPS, by_layer, heat, heat_strips
from grist_tools.report_html import Html, duration, escape, flatten, number, shown, table, tag
from grist_tools.report_run import read_runs
from grist_tools.report_step_time import step_time


def test_text_is_escaped_and_html_is_not():
    assert tag("p", "<b>", Html("<i></i>"), None, ["&", ["'"]]) == "<p>&lt;b&gt;<i></i>&amp;&#x27;</p>"
    assert tag("a", title='"><script>', class_="x", hidden=True, id=None) == (
        '<a title="&quot;&gt;&lt;script&gt;" class="x" hidden></a>'
    )


def test_what_html_cannot_say_is_replaced():
    text = escape("a\x00b\x1bc\ud800d\ufffee\nf\tg")
    assert text == "a\ufffdb\ufffdc\ufffdd\ufffde\nf\tg"
    text.encode("utf-8")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        (math.nan, "NaN"),
        (-math.inf, "-infinite"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.2 s"),
        (59.7, "1 min 00 s"),
        (185, "3 min 05 s"),
        (8040, "2 h 14 min"),
        (273600, "3 d 04 h"),
        (math.nan, "NaN"),
    ],
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_settings_are_exact_and_empty_ones_stay():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
    assert shown(0.1 + 0.2) == "0.30000000000000004"
    assert [shown(value) for value in (None, True, "x", [1, "é"])] == ["null", "true", "x", '[1, "é"]']


def test_a_table_is_well_formed():
    page = Page(table("Facts", ["key", "value"], [["<k>", "v"], ["l", "w"]]))
    assert [len(page.of(name)) for name in ("caption", "th", "td", "tr")] == [1, 4, 2, 3]


def test_cells_are_means_of_finite_values_or_the_worst():
    steps = list(range(1, 4 * COLUMNS + 1))
    values = np.ones((len(steps), 2))
    values[5, 1] = 9.0
    values[0:4, 0] = [np.nan, 2.0, 4.0, np.inf]
    x = step_axis([steps])
    columns, mean = cells(steps, values, x)
    assert columns == list(range(COLUMNS))
    assert mean[0].tolist() == [3.0, 1.0]
    assert mean[1].tolist() == [1.0, 3.0]
    _, worst = cells(steps, values, x, worst=True)
    assert worst[1].tolist() == [1.0, 9.0]


def test_cells_without_a_finite_value_are_empty():
    values = np.array([[np.nan], [1.0]])
    for worst in (False, True):
        _, found = cells([1, 2], values, step_axis([[1, 2]]), worst)
        assert np.isnan(found[0, 0])
        assert found[1, 0] == 1.0


def test_steps_that_are_missing_leave_a_gap():
    columns, _ = cells([1, 2, 99, 100], np.ones((4, 1)), step_axis([[1, 100]]))
    assert columns == [0, 3]


def test_a_heat_strip_has_a_row_a_layer_and_a_stroke_a_cell(tmp_path):
    run = read_runs([str(full_run(tmp_path / "a"))])[0]
    _, values = by_layer("load_max_over_mean", run)
    assert values.shape == (10, 2)
    assert values[3].tolist() == [1.25, 2.25]
    drawn = heat(STRIPS[0], run)
    assert drawn is not None
    assert sum(path.count("M") for path in re.findall(r'd="([^"]*)" class="heat', drawn)) == 20
    assert "layer 1: mean 2.293, last 2.1, highest 3 at step 1" in drawn


def test_counts_have_a_level_a_number(tmp_path):
    run = read_runs([str(full_run(tmp_path / "a"))])[0]
    drawn = heat(STRIPS[2], run)
    assert drawn is not None
    assert re.findall(r'key block (h\d)"></span>(\d+)<', drawn) == [("h0", "0"), ("h7", "1")]
    many = [row(step, dead_experts=[step - 1, 0]) for step in range(1, 41)]
    write_rows(run.folder / "metrics.jsonl", many)
    drawn = heat(STRIPS[2], read_runs([str(run.folder)])[0])
    assert drawn is not None
    assert [text for _, text in re.findall(r'key block (h\d)"></span>(\d+)<', drawn)] == [
        "0",
        "5",
        "10",
        "15",
        "20",
        "25",
        "30",
        "35",
    ]


def test_broken_and_odd_layers_cost_no_page(tmp_path):
    folder = full_run(tmp_path / "a")
    rows = [row(1, layers=3), row(2), row(3, load_cv=[math.nan, 0.5]), row(4, load_cv=None), row(5, load_cv=["x", 1])]
    write_rows(folder / "metrics.jsonl", [*rows, row(6, load_cv=[None, 0.25])])
    run = read_runs([str(folder)])[0]
    steps, values = by_layer("load_cv", run)
    assert steps == [2, 3, 6]
    assert np.isnan(values[1:, 0]).all()
    assert "NaN" not in heat_strips(run)


def test_a_dense_run_says_that_it_has_no_layers_to_show(tmp_path):
    folder = full_run(tmp_path / "a")
    write_rows(folder / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    assert "a dense model" in heat_strips(read_runs([str(folder)])[0])


def test_step_time_adds_up_and_takes_absent_parts_for_nothing(tmp_path):
    folder = full_run(tmp_path / "a")
    rows = [{"step": step, "time_forward_ms": 30.0, "time_data_ms": 10.0} for step in range(1, 5)]
    rows[3]["time_checkpoint_ms"] = 40.0
    write_rows(folder / "metrics.jsonl", rows)
    page = Page(step_time(read_runs([str(folder)])[0]))
    words = page.sections[""].split("slowest step")[1].split()
    assert words == "data 10 20.0% 10 forward 30 60.0% 30 checkpoint 10 20.0% 40 together 50 100.0% 80".split()


def test_stages_fill_in_what_they_leave(tmp_path):
    folder = full_run(tmp_path / "a")
    text = (folder / "config.yaml").read_text()
    text = text.replace("sources: {}", "sources: {a: {directory: x, weight: 3}, b: {directory: y, weight: 1}}")
    (folder / "config.yaml").write_text(
        text.replace("  sequence_length: 32", "  - {after_step: 50, weights: {b: 2}}\n  sequence_length: 32")
    )
    words = Page(stages(read_runs([str(folder)])[0])).sections[""].split("tokens a step")[1].split()
    assert (
        words == "0 0 yes a 75.0%, b 25.0% 32 4 128 1 5 yes a 75.0%, b 25.0% 64 4 256 2 50 no b 100.0% 64 4 256".split()
    )


def test_bad_batches_of_any_shape_are_shown(tmp_path):
    folder = full_run(tmp_path / "a")
    rows = [
        {"step": 3, "reason": "nan", "text": "one"},
        {"texts": ["two", "three"], "loss": math.nan, "ids": [[1, 2]]},
        {},
    ]
    write_rows(folder / "bad_batches.jsonl", rows, tail='{"step": 4, "wh')
    text = Page(bad_batches(read_runs([str(folder)])[0])).sections[""]
    for said in ("3 written down.", "step 3: nan", "one", "two", "three", "loss NaN", "[[1, 2]]", "no reason given"):
        assert said in text, said


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "evaluation.json", "bad_batches.jsonl"])
@pytest.mark.parametrize("content", ["[1, 2\n{}", "[1, 2]\n{}", "\x00\n\xff"])
def test_a_file_that_cannot_be_read_is_a_line_on_the_page(tmp_path, name, content):
    folder = full_run(tmp_path / "a")
    (folder / name).write_text(content)
    assert f"{name} could not be read" in read_runs([str(folder)])[0].problems[name]


def test_metrics_without_a_row_are_a_line_on_the_page(tmp_path):
    folder = full_run(tmp_path / "a")
    (folder / "metrics.jsonl").write_text("")
    run = read_runs([str(folder)])[0]
    assert "no metrics to draw" in run.problems["metrics.jsonl"]
    assert run.step == 0


def test_checkpoints_are_read_with_their_state(tmp_path):
    folder = full_run(tmp_path / "a")
    (folder / "checkpoints" / "step-9").mkdir()
    (folder / "checkpoints" / "step-9" / "state.json").write_text('{"ste')
    (folder / "checkpoints" / "notes.txt").write_text("mine")
    found = read_runs([str(folder)])[0].checkpoints
    assert [(each.step, each.validation_loss, each.whole) for each in found] == [
        (4, 0.75, True),
        (8, 0.5, True),
        (9, None, False),
        (10, None, False),
    ]
    assert found[0].n_bytes == len(json.dumps({"step": 4, "validation_loss": 0.75}))
