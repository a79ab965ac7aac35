"""`python -m grist_eval`: what it writes, what it prints, what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import pytest
import tiny_house

import grist_model
from grist_data import Shards, Tokenizer
from grist_data.tokenizer_training import train_bpe
from grist_eval.__main__ import chosen_tasks, main
from grist_eval.bits_per_byte import bits_per_byte
from grist_eval.environment import pick_device, sha256
from grist_eval.tasks import TASKS
from grist_tools.bench_eval_rows import write_rows


def run(model_directory, tmp_path, *arguments) -> tuple[int, dict | None]:
    out = tmp_path / "report.json"
    status = main([str(model_directory), "--out", str(out), "--device", "cpu", *map(str, arguments)])
    return status, json.loads(out.read_text(encoding="utf-8")) if out.exists() else None


def test_all_tasks_in_one_report(model_directory, dataset_directory, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The miller", "reference": " sat by the fire"}\n')
    status, report = run(
        model_directory, tmp_path,
        "--tasks", "bits_per_byte,samples,generation", "--data", dataset_directory, "--sequence-length", 32,
        "--prompts", prompts, "--prompt", "Water", "--sample-tokens", 4, "--new-tokens", 4,
        "--samples-out", tmp_path / "samples.txt",
    )  # fmt: skip
    assert status == 0
    assert report is not None
    assert list(report["tasks"]) == list(TASKS)
    assert report["model"]["files_sha256"] == {"model.safetensors": sha256(model_directory / "model.safetensors")}
    assert report["model"]["tokenizer_sha256"] == Tokenizer.load(model_directory).sha256
    assert {"device", "versions", "date", "seconds"} <= report.keys()
    held_out = Shards.open(dataset_directory, split="val")
    network = grist_model.load(model_directory)
    expected = bits_per_byte(network, held_out, sequence_length=32)
    bits = report["tasks"]["bits_per_byte"]
    assert {key: bits[key] for key in expected} == expected
    assert bits["dataset_id"] == held_out.dataset_id
    assert (bits["split"], bits["sequence_length"], bits["stride"]) == ("val", 32, 32)
    assert len(report["tasks"]["samples"]["samples"]) == 4
    assert "prompt: 'Water'" in (tmp_path / "samples.txt").read_text()
    assert len(report["tasks"]["generation"]["completions"]) == 1
    printed = capsys.readouterr().out
    assert f"{expected['bits_per_byte']:.4f}" in printed
    assert "rouge-L" in printed


def test_the_report_lies_beside_the_model_by_default(model_directory, tmp_path):
    copy = tmp_path / "run" / "model"
    shutil.copytree(model_directory, copy)
    assert main([str(copy), "--tasks", "samples", "--sample-tokens", "2", "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "run" / "evaluation_report.json").read_text())["tasks"].keys() == {"samples"}


def test_another_tokenizer_is_refused_with_both_hashes(dataset_directory, tmp_path, capsys):
    other = train_bpe(["other text altogether, " * 50], 300)
    directory = tmp_path / "model"
    grist_model.save(tiny_house.model(), directory, tokenizer=other)
    status, report = run(directory, tmp_path, "--tasks", "bits_per_byte", "--data", dataset_directory)
    message = capsys.readouterr().err
    assert status == 2
    assert report is None
    assert other.sha256 in message
    assert tiny_house.tokenizer().sha256 in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "bits_per_byte"], "needs --data"),
        (["--tasks", "generation"], "needs --prompts"),
        (["--tasks", "bleurt"], r"unknown task(s) bleurt; there are bits_per_byte, samples, generation"),
        (["--tasks", ","], "unknown task(s)"),
        (["--tasks", "samples", "--sample-tokens", "0"], "--sample-tokens must be at least 1"),
        (["--tasks", "samples", "--device", "quantum"], "unknown device 'quantum'"),
        (["--tasks", "bits_per_byte", "--data", "/nowhere"], "/nowhere"),
        (["--tasks", "piqa", "--task-data", "piqa=/nowhere"], "no such file of rows: /nowhere"),
        (
            ["--tasks", "piqa", "--task-data", "sciq=/nowhere"],
            "neither a folder nor TASK=FILE with a task that was asked",
        ),
        (["--tasks", "piqa", "--task-data", "{here}"], "there is no file of piqa, such as piqa.jsonl"),
        (["--tasks", "piqa", "--limit", "0"], "limit must be at least 1, but is 0"),
        (["--tasks", "humaneval"], "pass --allow-code-execution"),
    ],
)
def test_bad_options_are_told(model_directory, tmp_path, capsys, arguments, message):
    out = tmp_path / "report.json"
    arguments = [str(model_directory), "--out", str(out), *(each.format(here=tmp_path) for each in arguments)]
    assert main(arguments if "--device" in arguments else [*arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_directory_without_a_model_is_told(tmp_path, capsys):
    assert run(tmp_path, tmp_path, "--tasks", "samples")[0] == 2
    assert "is not a portable model directory" in capsys.readouterr().err


def test_a_bad_row_is_named_before_the_model_is_loaded(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": 1}\n')
    assert run(tmp_path / "absent", tmp_path, "--tasks", "generation", "--prompts", prompts)[0] == 2
    assert "prompts.jsonl:1" in capsys.readouterr().err


def test_numbers_are_printed_even_when_they_cannot_be_written(model_directory, tmp_path, capsys, monkeypatch):
    def full(report, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grist_eval.__main__.write_json", full)
    assert main([str(model_directory), "--tasks", "samples", "--sample-tokens", "2", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert "samples" in captured.out
    assert "No space left" in captured.err


def test_questions_stand_beside_other_tasks(model_directory, tmp_path, capsys):
    rows = tmp_path / "rows"
    for name in ("winogrande", "gsm8k", "mbpp"):
        write_rows(rows, name, 3)
    arguments = ["--tasks", "winogrande,samples,gsm8k,mbpp", "--sample-tokens", 2, "--task-data", rows, "--shots", 0]
    arguments += ["--answer-tokens", 3, "--allow-code-execution", "--cache", tmp_path / "cache"]
    status, report = run(model_directory, tmp_path, *arguments)
    assert status == 0
    assert report is not None
    assert list(report["tasks"]) == ["winogrande", "samples", "gsm8k", "mbpp"]
    assert report["tasks"]["mbpp"]["pass_at_1"] == 0
    assert report["core"] == pytest.approx(report["tasks"]["winogrande"]["centred"] / 3)
    printed = capsys.readouterr().out
    assert f"CORE over 3 task(s): {report['core']:.4f}" in printed
    assert "strict_match" in printed
    table = (tmp_path / "report.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["winogrande", "gsm8k", "mbpp"]
    again = run(model_directory, tmp_path, *arguments)[1]
    assert again is not None
    assert again["tasks"]["gsm8k"]["rows_sha256"] == report["tasks"]["gsm8k"]["rows_sha256"]
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_rows_of_a_task_are_in_one_file(model_directory, tmp_path, capsys):
    for kind in ("jsonl", "parquet"):
        (tmp_path / f"piqa.{kind}").touch()
    assert run(model_directory, tmp_path, "--tasks", "piqa", "--task-data", tmp_path)[0] == 2
    assert "both piqa.jsonl and piqa.parquet are there; name one, piqa=FILE" in capsys.readouterr().err


def test_tasks_are_run_once_and_in_order():
    assert chosen_tasks(" samples, bits_per_byte,samples") == ["samples", "bits_per_byte"]


def test_auto_picks_a_device_that_is_there():
    assert pick_device(pick_device("auto")) == pick_device("auto")
    assert pick_device("cpu") == "cpu"


def test_help_does_not_wait_for_torch():
    started = time.perf_counter()
    code = (
        "import sys; from grist_eval.__main__ import parser; parser().format_help(); sys.exit('torch' in sys.modules)"
    )
    paths = ":".join(sys.path)
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": paths}, check=True)
    assert time.perf_counter() - started < 2
