"""Questions during training: asked with the held-out text, and told early when something is wrong with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny_house
import torch

from grist_eval.questions import Settings, evaluate_tasks
from grist_tools.bench_eval_rows import write_rows
from grist_train.config import EvaluateConfig, parse
from grist_train.distributed import World
from grist_train.question_tasks import check_questions, questions_of, task_scores

NO_GROUP: Any = None  # one process has none
ALONE = World(0, 1, 0, torch.device("cpu"), NO_GROUP, NO_GROUP)


@pytest.fixture
def settings(tmp_path) -> EvaluateConfig:
    for name in ("piqa", "winogrande"):
        write_rows(tmp_path, name, 6)
    tasks = {name: str(tmp_path / f"{name}.jsonl") for name in ("piqa", "winogrande")}
    return EvaluateConfig(tasks=tasks, task_rows=4, task_shots=1)


def test_a_model_in_memory_scores_what_the_evaluation_says(settings):
    network, of_text = tiny_house.model(context_length=512), tiny_house.tokenizer()
    found = task_scores(network, of_text, settings, ALONE)
    expected = evaluate_tasks(
        network, of_text, ["piqa", "winogrande"], data=settings.tasks, settings=Settings(shots=1, limit=4)
    )
    assert found == {"tasks": expected["tasks"], "core": expected["core"]}
    assert [each["rows"] for each in found["tasks"].values()] == [4, 4]


def test_rows_are_read_once(settings, tmp_path):
    first = questions_of(settings)
    (tmp_path / "piqa.jsonl").unlink()
    assert questions_of(settings) is first


def test_no_tasks_no_scores():
    check_questions(EvaluateConfig(), has_held_out=False)
    assert task_scores(tiny_house.model(), tiny_house.tokenizer(), EvaluateConfig(), ALONE) == {}


def test_what_is_wrong_is_told_before_training(settings, tmp_path):
    with pytest.raises(ValueError, match=r"evaluate\.tasks \(piqa, winogrande\) are asked when .* validation split"):
        check_questions(settings, has_held_out=False)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"goal": 1}) + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: no column 'sol1'"):
        check_questions(EvaluateConfig(tasks={"piqa": str(bad)}), has_held_out=True)
    with pytest.raises(ValueError, match=r"unknown task\(s\) poetry"):
        check_questions(EvaluateConfig(tasks={"poetry": "hub"}), has_held_out=True)
    with pytest.raises(ValueError, match="runs code that the model wrote"):
        check_questions(EvaluateConfig(tasks={"humaneval": "hub"}), has_held_out=True)


def test_tasks_are_a_line_of_the_run_file_or_the_command():
    config = parse(["--evaluate.tasks", "{hellaswag: rows/hellaswag.jsonl, piqa: hub}", "--evaluate.task_rows", "50"])
    assert config.evaluate.tasks == {"hellaswag": "rows/hellaswag.jsonl", "piqa": "hub"}
    assert config.evaluate.task_rows == 50
    assert parse([]).evaluate.tasks == {}


@pytest.mark.parametrize("key", ["every", "max_tokens", "batch_size", "task_rows", "task_shots"])
def test_numbers_out_of_range_are_told(key):
    values: dict[str, Any] = {key: -1}
    with pytest.raises(ValueError, match=rf"evaluate\.{key} must be at least \d, but is -1"):
        EvaluateConfig(**values)
