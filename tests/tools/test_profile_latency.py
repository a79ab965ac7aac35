from __future__ import annotations

import json
import shutil

import pytest
from tiny_house import model, random_ids

import grist_model
from grist_tools.profile_latency import Shape, grid, latency_table, main, measure, run_once


def test_the_grid_leaves_out_what_does_not_fit_the_context():
    assert grid([1, 2], [16, 60], [8], 64) == [Shape(1, 16, 8), Shape(2, 16, 8)]
    with pytest.raises(ValueError, match="context of 64 tokens"):
        grid([1], [64], [1], 64)


def test_every_token_is_timed_and_decoding_is_what_generate_does(monkeypatch):
    network = model()
    drawn = []
    whole = network.forward

    def listening(ids_BT, **options):
        logits = whole(ids_BT, **options)
        drawn.append(logits[0, -1].argmax().item())
        return logits

    monkeypatch.setattr(network, "forward", listening)
    ids = random_ids(2, 10)
    seconds = run_once(network, ids, 5)
    assert len(seconds) == 5
    assert all(second > 0 for second in seconds)
    monkeypatch.undo()
    assert drawn == grist_model.generate(network, ids[0].tolist(), max_new_tokens=5, temperature=0)


def test_a_row_holds_consistent_numbers():
    row = measure(model(), Shape(2, 8, 4), "cpu", 3)
    assert row["prefill_tokens_per_second"] == pytest.approx(16 / (row["first_token_ms"] / 1e3))
    assert row["decode_tokens_per_second"] == pytest.approx(2 / (row["between_tokens_p50_ms"] / 1e3))
    assert row["between_tokens_p50_ms"] <= row["between_tokens_p90_ms"] <= row["between_tokens_p99_ms"]
    assert row["peak_process_bytes"] > 2**20


def test_one_token_has_no_time_between_tokens():
    row = measure(model(), Shape(1, 8, 1), "cpu", 1)
    assert "decode_tokens_per_second" not in row
    assert latency_table([row]).splitlines()[-1].split()[4:7] == ["-", "-", "-"]


def test_command_line_prints_a_table_and_writes_the_numbers(model_directory, tmp_path, capsys):
    copy = tmp_path / "run" / "model"
    shutil.copytree(model_directory, copy)
    arguments = ["--batches", "1,2", "--prompts", "8", "--outputs", "3", "--repetitions", "1", "--device", "cpu"]
    assert main([str(copy), *arguments]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    report = json.loads((tmp_path / "run" / "latency.json").read_text())
    assert [(row["batch"], row["prompt"], row["output"]) for row in report["rows"]] == [(1, 8, 3), (2, 8, 3)]
    assert {"device", "versions", "date", "kernels", "dtype", "parameters", "threads"} <= report.keys()


@pytest.mark.parametrize("arguments", [["--prompts", "64"], ["--repetitions", "0"]])
def test_bad_input_is_told(model_directory, tmp_path, capsys, arguments):
    out = tmp_path / "out.json"
    assert main([str(model_directory), *arguments, "--device", "cpu", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("profile_latency: ")
    assert not out.exists()


def test_numbers_below_one_are_no_shape(model_directory, capsys):
    with pytest.raises(SystemExit):
        main([str(model_directory), "--batches", "0"])
    assert "expected numbers from 1" in capsys.readouterr().err
