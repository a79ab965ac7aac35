"""Rows of tasks: every kind of file reads alike, and every bad row is named by file and place."""

from __future__ import annotations

import json

import pytest

from grist_eval.few_shot import prefixes
from grist_eval.row_files import hub_rows, read_rows
from grist_eval.tasks import ROW_TASKS
from grist_tools.bench_eval_rows import invented_rows, write_rows

# What a bad row of each task has, and what is said of it.
FAULTS = {
    "hellaswag": ({"endings": ["a", "b", "c"]}, "'endings' must hold 4 strings, but holds 3"),
    "arc_easy": ({"answerKey": "X"}, "'answerKey' must be one of A, B, C, D"),
    "piqa": ({"label": 2}, "'label' must be a number from 0 to 1, but is 2"),
    "winogrande": ({"sentence": "Nothing is left out."}, "'sentence' must have a blank, _, with text after it"),
    "boolq": ({"passage": ""}, "'passage' must not be empty"),
    "openbookqa": ({"choices": ["a", "b"]}, "'choices' must hold named values, but is ['a', 'b']"),
    "sciq": ({"distractor2": None}, "'distractor2' must be a string, but is None"),
    "commonsense_qa": ({"answerKey": "F"}, "'answerKey' must be one of A, B, C, D, E, but is 'F'"),
    "mmlu": ({"choices": ["a", 2, "c", "d"]}, "'choices' must be a list of strings that are not empty"),
    "lambada_openai": ({"text": "one"}, "'text' must be a passage that ends in a word after a space, but is 'one'"),
    "gsm8k": ({"answer": "7"}, "'answer' must end in '#### ' and a number, but is '7'"),
    "triviaqa": ({"answer": {"aliases": []}}, "'answer' must hold 'aliases', at least one string"),
    "humaneval": ({"entry_point": 3}, "'entry_point' must be a string, but is 3"),
    "mbpp": ({"test_list": ["assert True"]}, "'test_list' must hold 3 strings, but holds 1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_row_is_named_and_none_is_dropped(tmp_path, name):
    wrong, message = FAULTS[name]
    rows = invented_rows(name, 4)
    if name == "arc_easy":
        rows[2]["choices"] = {"text": ["w", "x", "y", "z"], "label": list("ABCD")}
    rows[2] |= wrong
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n{not json\n")
    with pytest.raises(ValueError, match=r"2 bad row\(s\)") as caught:
        read_rows(ROW_TASKS[name], path)
    assert f"{path}:3: {message}" in str(caught.value)
    assert f"{path}:6: not a line of JSON" in str(caught.value)
    column = ROW_TASKS[name].columns[0]
    del rows[0][column]
    path.write_text(json.dumps(rows[0]) + "\n[1]\n")
    with pytest.raises(ValueError, match=rf":1: no column '{column}'(?s:.*):2: expected named columns, but got list"):
        read_rows(ROW_TASKS[name], path)


@pytest.mark.parametrize("name", ROW_TASKS)
def test_every_kind_of_file_reads_alike(tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    written = write_rows(tmp_path, name, 9)
    expected = read_rows(ROW_TASKS[name], written)
    assert len(expected) == 9
    assert read_rows(ROW_TASKS[name], written, limit=4) == expected[:4]
    table = pyarrow.Table.from_pylist(invented_rows(name, 9))
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    for kind in ("parquet", "arrow"):
        assert read_rows(ROW_TASKS[name], tmp_path / f"rows.{kind}") == expected


def test_a_bad_row_of_a_table_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = invented_rows("piqa", 3)
    rows[1]["label"] = 7
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(ValueError, match=r"rows.parquet:1: 'label' must be a number from 0 to 1, but is 7"):
        read_rows(ROW_TASKS["piqa"], path)


def test_what_is_no_file_of_rows_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of rows"):
        read_rows(ROW_TASKS["piqa"], tmp_path / "absent.jsonl")
    (tmp_path / "rows.csv").write_text("goal\n")
    with pytest.raises(ValueError, match=r"rows are read from .jsonl, .json, .parquet, .arrow"):
        read_rows(ROW_TASKS["piqa"], tmp_path / "rows.csv")
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows; expected the columns goal, sol1, sol2, label"):
        read_rows(ROW_TASKS["piqa"], tmp_path / "none.jsonl")


def test_rows_by_name_are_asked_of_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, subset, split):
        asked.append((path, subset, split))
        if split == "gone":
            raise ConnectionError("no network")
        return invented_rows("piqa", 5)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(hub_rows(ROW_TASKS["piqa"], "validation", limit=3)) == 3
    assert asked == [("baber/piqa", None, "validation")]
    with pytest.raises(ValueError, match=r"baber/piqa \(default, gone\) cannot be had: no network; pass its rows"):
        hub_rows(ROW_TASKS["piqa"], "gone")


def rows_of(tmp_path, name, count, seed=0):
    return read_rows(ROW_TASKS[name], write_rows(tmp_path / str(seed), name, count, seed))


def test_examples_do_not_depend_on_how_many_rows_there_are(tmp_path):
    rows, pool = rows_of(tmp_path, "piqa", 20), rows_of(tmp_path, "piqa", 20, seed=5)
    whole = prefixes(ROW_TASKS["piqa"], rows, pool, 3)
    assert prefixes(ROW_TASKS["piqa"], rows[:7], pool, 3) == whole[:7]
    assert len(set(whole)) > 10
    assert prefixes(ROW_TASKS["piqa"], rows, pool, 3, seed=1) != whole
    examples = {row.example for row in pool}
    assert all(prefix.count("\n\n") == 3 and set(prefix.split("\n\n")[:3]) <= examples for prefix in whole)


@pytest.mark.parametrize("name", ["piqa", "lambada_openai", "mmlu"])
def test_a_row_is_never_its_own_example(tmp_path, name):
    rows = rows_of(tmp_path, name, 12)
    for row, prefix in zip(rows, prefixes(ROW_TASKS[name], rows, None, 2), strict=True):
        assert row.example not in prefix
        assert prefix.count("\n\n") >= 2


def test_examples_of_a_subject_are_its_first_rows(tmp_path):
    rows, pool = rows_of(tmp_path, "mmlu", 6), rows_of(tmp_path, "mmlu", 15, seed=5)
    for row, prefix in zip(rows, prefixes(ROW_TASKS["mmlu"], rows, pool, 2), strict=True):
        first, second = [other.example for other in pool if other.group == row.group][:2]
        assert prefix == f"{row.description}{first}\n\n{second}\n\n"


def test_too_few_rows_to_draw_from_are_told(tmp_path):
    rows = rows_of(tmp_path, "piqa", 3)
    with pytest.raises(ValueError, match="5 examples were asked for, but there are 3 rows to draw from"):
        prefixes(ROW_TASKS["piqa"], rows, None, 5)
    with pytest.raises(ValueError, match="there are 1 rows of group 'milling_and_baking'"):
        prefixes(ROW_TASKS["mmlu"], rows_of(tmp_path, "mmlu", 3), rows_of(tmp_path, "mmlu", 3, seed=5), 2)
    with pytest.raises(ValueError, match="must be 0 or more, but is -1"):
        prefixes(ROW_TASKS["piqa"], rows, None, -1)
