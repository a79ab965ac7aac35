from __future__ import annotations

import json
import shutil

import pytest
from tiny_house import model

from grist_tools.latency import Shape, measure
from grist_tools.profile_latency import main


def test_a_row_holds_consistent_numbers():
    row = measure(model(), Shape(2, 8, 4), "cpu", 3)
    assert row["prefill_tokens_per_second"] == pytest.approx(16 / (row["first_token_ms"] / 1e3))
    assert row["decode_tokens_per_second"] == pytest.approx(2 / (row["decode_step_ms"] / 1e3))
    assert row["between_tokens_p50_ms"] <= row["between_tokens_p90_ms"] <= row["between_tokens_p99_ms"]
    assert next(value for key, value in row.items() if key.startswith("peak_process")) > 2**20


GRID = ["--batches", "1,2", "--prompts", "8", "--outputs", "3", "--repetitions", "1", "--device", "cpu"]


@pytest.fixture
def copied(model_directory, tmp_path):
    return shutil.copytree(model_directory, tmp_path / "run" / "model")


def test_command_line_prints_a_table_and_writes_numbers_and_a_picture(copied, capsys):
    assert main([str(copied), *GRID]) == 0
    said = capsys.readouterr().out
    assert len(said.split("\n\n")[0].splitlines()) == 4
    assert "decode: " in said
    report = json.loads((copied.parent / "latency.json").read_text())
    assert [(row["batch"], row["prompt"], row["output"]) for row in report["rows"]] == [(1, 8, 3), (2, 8, 3)]
    assert {"device", "versions", "date", "kernels", "dtype", "parameters", "threads", "ceilings"} <= report.keys()
    assert all(row["decode_share_of_copy"] > 0 and row["prefill_share_of_matmul"] > 0 for row in report["rows"])
    assert report["operations"]["shape"] == {"batch": 2, "prompt": 8, "output": 3}
    assert (copied.parent / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_beside_transformers_every_shape_has_two_rows(copied, capsys):
    pytest.importorskip("transformers")
    assert main([str(copied), *GRID, "--against", "transformers", "--ops", "0"]) == 0
    rows = json.loads((copied.parent / "latency.json").read_text())["rows"]
    assert [row["who"] for row in rows] == ["gristmill", "transformers"] * 2
    assert [row["same_ids"] for row in rows] == [1.0] * 4
    assert "same ids" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--prompts", "64"], ["--repetitions", "0"]])
def test_bad_input_is_told(model_directory, tmp_path, capsys, arguments):
    out = tmp_path / "out.json"
    assert main([str(model_directory), *arguments, "--device", "cpu", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("profile_latency: ")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--batches", "0"], "expected numbers from 1"), (["--against", "vllm,exllama"], "got exllama")],
)
def test_what_cannot_be_meant_is_told(model_directory, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main([str(model_directory), *arguments])
    assert message in capsys.readouterr().err
