"""Tasks of questions, whole: going on after a stop, any number of ranks, limits, and what they come to together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
from lm_eval_subject import PLAIN, subject

from grist_eval import asking
from grist_eval.__main__ import main
from grist_eval.questions import Ranks, Settings, evaluate_tasks, load_questions
from grist_eval.result_cache import ResultCache
from grist_tools.bench_eval_rows import write_rows

NAMES = ["hellaswag", "winogrande", "mmlu", "lambada_openai", "triviaqa"]
ROWS = 9
SETTINGS = Settings(shots=1, max_new_tokens=6, batch_tokens=700)


@pytest.fixture(scope="module")
def of_rows(tmp_path_factory):
    """-> (model, tokenizer, files of rows)."""
    folder = tmp_path_factory.mktemp("rows")
    return *subject(), {name: write_rows(folder, name, ROWS) for name in NAMES}


def asked(of_rows, **options):
    network, of_text, data = of_rows
    return evaluate_tasks(network, of_text, NAMES, data=data, settings=SETTINGS, **options)


@pytest.fixture(scope="module")
def whole(of_rows):
    return asked(of_rows)


def test_a_report_says_what_was_asked_and_what_it_came_to(of_rows, whole):
    assert list(whole["tasks"]) == NAMES
    for name, result in whole["tasks"].items():
        assert (result["rows"], result["shots"]) == (ROWS, 1)
        assert result["origin"] == str(of_rows[2][name])
        assert result["centred"] == pytest.approx((result[result["main"]] - result["chance"]) / (1 - result["chance"]))
        assert f"{result['main']}_stderr" in result
        assert len(whole["items"][name]) == ROWS
    assert whole["core"] == pytest.approx(sum(result["centred"] for result in whole["tasks"].values()) / len(NAMES))
    assert {"acc", "acc_norm", "acc_bytes", "acc_tokens"} <= whole["tasks"]["hellaswag"].keys()
    assert "acc_norm" not in whole["tasks"]["winogrande"]
    assert whole["tasks"]["lambada_openai"]["perplexity"] > 1


def test_a_limit_takes_the_first_rows(of_rows, whole):
    network, of_text, data = of_rows
    settings = Settings(shots=0, limit=4)
    few = evaluate_tasks(network, of_text, ["hellaswag"], data=data, settings=settings)
    assert few["tasks"]["hellaswag"]["rows"] == 4
    every = evaluate_tasks(network, of_text, ["hellaswag"], data=data, settings=Settings(shots=0))
    for a, b in zip(few["items"]["hellaswag"], every["items"]["hellaswag"], strict=False):
        assert [s.log_likelihood for s in a["scores"]] == pytest.approx(
            [s.log_likelihood for s in b["scores"]], abs=1e-4
        )
    assert every["tasks"]["hellaswag"]["rows_sha256"] != few["tasks"]["hellaswag"]["rows_sha256"]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bits(of_rows, whole, tmp_path, monkeypatch, after):
    add, calls = ResultCache.add, []

    def stopping(self, results):
        if len(calls) == after:
            raise Stopped
        calls.append(len(results))
        add(self, results)

    monkeypatch.setattr(ResultCache, "add", stopping)
    with pytest.raises(Stopped):
        asked(of_rows, cache=tmp_path, model_key="m")
    last = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    last.write_bytes(last.read_bytes() + b'{"row": "torn')
    monkeypatch.setattr(ResultCache, "add", add)
    assert asked(of_rows, cache=tmp_path, model_key="m") == whole
    monkeypatch.setattr(asking, "score_groups", lambda *_, **__: None)  # all is known: nothing may be asked
    monkeypatch.setattr(asking, "plan", lambda *_: [])
    monkeypatch.setattr(asking, "write_answers", lambda model, tokenizer, prompts, *_: [][len(prompts) :])
    assert asked(of_rows, cache=tmp_path, model_key="m") == whole


def test_what_is_known_of_one_model_is_not_another_s(of_rows, tmp_path):
    network, of_text, data = of_rows
    options = {"data": data, "settings": Settings(shots=0), "cache": tmp_path}
    first = evaluate_tasks(network, of_text, ["winogrande"], model_key="first", **options)
    with_noise = subject()[0]
    for parameter in with_noise.parameters():
        parameter.data *= 1.5
    second = evaluate_tasks(with_noise, of_text, ["winogrande"], model_key="second", **options)
    assert first["items"] != second["items"]
    assert evaluate_tasks(with_noise, of_text, ["winogrande"], model_key="first", **options) == first
    with pytest.raises(ValueError, match="a cache needs model_key"):
        evaluate_tasks(network, of_text, ["winogrande"], **options)


def test_a_damaged_cache_is_told(tmp_path):
    cache = ResultCache(tmp_path, "m", "piqa")
    cache.add({"a": 1, "b": [1.5, True]})
    cache.close()
    assert ResultCache(tmp_path, "m", "piqa", rank=3).known() == {"a": 1, "b": [1.5, True]}
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"?\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"0.jsonl:1 is no result"):
        cache.known()


def test_a_task_that_runs_code_asks_for_leave(tmp_path):
    data = {"humaneval": write_rows(tmp_path, "humaneval", 2)}
    with pytest.raises(ValueError, match="runs code that the model wrote: pass --allow-code-execution"):
        load_questions(["humaneval"], data=data)
    assert len(load_questions(["humaneval"], data=data, settings=Settings(allow_code=True))[0].rows) == 2


def test_settings_out_of_range_are_told():
    wrong: list[dict[str, Any]] = [{"shots": -1}, {"limit": 0}, {"batch_tokens": 0}, {"max_new_tokens": 0}]
    for options in wrong:
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least"):
            Settings(**options)
    with pytest.raises(ValueError, match=r"unknown task\(s\) sudoku; there are hellaswag"):
        load_questions(["sudoku"])


def _on_a_rank(rank, ranks, port, folder, sharded):
    """In a process of its own: its report as JSON, in a file by its rank."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    network, of_text = subject()
    if sharded:
        for block in network.blocks:
            fully_shard(block)
        fully_shard(network)
        register_fsdp_forward_method(network, "hidden")
    data = {name: folder / f"{name}.jsonl" for name in NAMES}
    found = evaluate_tasks(
        network, of_text, NAMES, data=data, settings=SETTINGS, rank=rank, world_size=ranks,
        cache=folder / "cache", model_key="m",
    )  # fmt: skip
    found["tasks"] = {name: {**result, "origin": ""} for name, result in found["tasks"].items()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_say_what_one_says(whole, tmp_path, sharded):
    import torch.multiprocessing as mp

    for name in NAMES:
        write_rows(tmp_path, name, ROWS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_on_a_rank, (2, port, tmp_path, sharded), nprocs=2)
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    one = {**whole, "tasks": {name: {**result, "origin": ""} for name, result in whole["tasks"].items()}}
    assert reports[0] == reports[1] == json.loads(json.dumps(one))
    by_rank = [len(list((tmp_path / "cache").glob(f"*.{rank}.jsonl"))) for rank in range(2)]
    assert by_rank[0] == len(NAMES)
    assert by_rank[1] == len(NAMES) - sharded  # there the first rank alone judges answers


def test_alone_a_process_has_what_it_gives():
    assert Ranks().same([1]) == [1]
    assert Ranks().gathered({"a": 1}) == [{"a": 1}]


def test_the_command_line_under_torchrun(tmp_path):
    from lm_eval_subject import portable

    directory = portable(tmp_path / "model")
    write_rows(tmp_path / "rows", "piqa", 6)
    arguments = [
        str(directory), "--device", "cpu", "--tasks", "piqa", "--task-data", str(tmp_path / "rows"),
        "--items-out", str(tmp_path / "items.jsonl"),
    ]  # fmt: skip
    assert main([*arguments, "--out", str(tmp_path / "one.json")]) == 0
    items = (tmp_path / "items.jsonl").read_text()
    assert [json.loads(line)["row"] for line in items.splitlines()] == list(range(6))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*launch, "-m", "grist_eval", *arguments, "--out", str(tmp_path / "two.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}, check=True, timeout=300,
    )  # fmt: skip
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for report in (one, two):
        del report["tasks"]["piqa"]["seconds"]
    assert one["tasks"] == two["tasks"]
    assert (tmp_path / "items.jsonl").read_text() == items
    assert "| piqa | 6 | 0 | acc |" in (tmp_path / "one.md").read_text()
    assert f"CORE, the mean of the last column: {one['core']:.4f}" in (tmp_path / "one.md").read_text()


def test_the_subject_is_what_transformers_reads():
    assert subject()[0].config.to_hf()["model_type"] == "llama"
    assert PLAIN["context_length"] == subject()[0].config.context_length
