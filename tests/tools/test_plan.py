"""The planner's answers: fits or not, changes that really help, a layout that the trainer takes, tokens, days and cost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from grist_tools.memory import FRAGMENTATION, RUNTIME_BYTES, Memory, estimate
from grist_tools.plan import budget, heaviest, main, tokens
from grist_tools.plan_advice import Candidate, advise, measured_memory
from grist_tools.plan_gpus import GPUS, this_cpu
from grist_tools.plan_layout import layout_of
from grist_tools.plan_links import Assumptions
from grist_tools.plan_report import duration
from grist_tools.plan_time import step_time
from grist_train.config import TrainConfig, load
from grist_train.data_config import StageConfig
from grist_train.preference_config import PreferenceConfig

RUNS = Path(__file__).parents[2] / "train" / "runs"
GIB = 2**30
H100 = GPUS["h100"]
SMALL = ["--model.layers", "2", "--model.expert_width", "256"]


def run(name: str, **overrides) -> TrainConfig:
    return load(RUNS / f"{name}.yaml", **overrides)


def by_formula(config, layout, gpu) -> Memory:
    return estimate(config, layout)


def arguments(name: str, gpus: int, *more: str, gpu: str = "h100") -> list[str]:
    return ["--config", str(RUNS / f"{name}.yaml"), "--gpus", str(gpus), "--gpu", gpu, *more]


def test_parameters_and_optimizer_are_what_float32_and_sharding_make_of_them():
    adam = run("moe_1b", **{"optimizer.name": "adamw"})
    memory = estimate(adam, layout_of(adam, 8, 8))
    assert memory.roles["optimizer state"] == 2 * memory.roles["parameters"]
    muon = run("moe_1b")
    assert (
        memory.roles["parameters"]
        < estimate(muon, layout_of(muon, 8, 8)).roles["optimizer state"]
        < memory.roles["optimizer state"]
    )


def test_what_the_allocator_takes_is_added_on_a_gpu_only():
    memory = Memory({"parameters": 10.0 * GIB}, "loss", "formula")
    assert memory.peak_bytes == 10 * GIB + RUNTIME_BYTES + FRAGMENTATION * 10 * GIB
    assert replace(memory, on_gpu=False).peak_bytes == 10 * GIB
    assert sum(memory.categories().values()) == memory.peak_bytes


def test_changes_that_are_named_make_the_run_fit():
    config = run("moe_1b", **{"batch.global_size": 64, "batch.micro_size": 8})
    own = layout_of(config, 8, 8)
    capacity = 0.7 * estimate(config, own).peak_bytes
    advice = advise(config, own, H100, capacity, Assumptions(), by_formula)
    named = {options for options, _ in advice.changes}
    assert {f"--compute.activation_checkpointing{kind}" for kind in (" block", " selective", ".every 2")} <= named
    assert all(each.memory.peak_bytes <= capacity for _, each in advice.changes)
    assert advice.best is not None
    assert advice.best.memory.peak_bytes <= capacity
    assert advice.reasons
    times = [each.time.total for _, each in advice.changes]
    assert times == sorted(times)


def test_long_sequences_that_do_not_fit_are_shared():
    config = run("gpt_oss_20b", **{"data.sequence_length": 131072, "batch.global_size": 8, "batch.micro_size": 1})
    own = layout_of(config, 8, 8)
    advice = advise(config, own, H100, H100.memory_bytes, Assumptions(), by_formula)
    assert any("--compute.context_parallel" in options for options, _ in advice.changes)
    assert advice.best is not None
    assert advice.best.layout.context_parallel > 1
    assert any("share a sequence" in reason for reason in advice.reasons)
    whole = budget(config, advice.best, H100, Assumptions(), None, None)
    assert whole.seconds == pytest.approx(config.steps * advice.best.time.total)


def test_where_nothing_fits_more_gpus_are_named():
    config = run("gpt_oss_120b")
    own = layout_of(config, 8, 8)
    advice = advise(config, own, H100, H100.memory_bytes, Assumptions(), by_formula)
    [(options, found)] = advice.changes
    assert options.startswith(f"{found.layout.gpus} GPUs")
    assert found.memory.peak_bytes <= H100.memory_bytes
    assert advice.best is None
    assert advise(config, own, H100, 1 * GIB, Assumptions(), by_formula).changes == []


def test_the_recommended_layout_is_the_fastest_that_fits_and_nothing_smaller_is_worth_a_change():
    config = run("gpt_oss_20b")
    own = layout_of(config, 64, 8)
    advice = advise(config, own, H100, H100.memory_bytes, Assumptions(), by_formula)
    assert advice.best is not None
    assert advice.best.time.total < 0.97 * advice.own.time.total
    config_of_best = advice.best.layout.config(config)
    again = advise(config_of_best, layout_of(config_of_best, 64, 8), H100, H100.memory_bytes, Assumptions(), by_formula)
    assert again.best is again.own
    assert "no other layout" in again.reasons[0]


def test_a_trace_that_fails_is_said(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such operation\nwith much detail")

    monkeypatch.setattr("grist_tools.plan_trace.trace", broken)
    config = run("quickstart")
    memory = measured_memory(config, layout_of(config, 1, 8), H100)
    assert memory.source == "formula: the step was not traced (RuntimeError: no such operation)"


def test_what_cannot_be_traced_is_said(tmp_path):
    pairs = PreferenceConfig(paths=(str(tmp_path / "pairs.jsonl"),))
    config = replace(TrainConfig(), preferences=pairs, initial=str(tmp_path))
    assert measured_memory(config, layout_of(config, 1, 8), H100).source.startswith("formula: steps on pairs")


def test_a_run_that_fits(capsys):
    status = main(arguments("quickstart", 1, "--tokens", "300B", "--price", "2", gpu="h200"))
    out = capsys.readouterr().out
    assert status == 0
    assert "fits: " in out
    assert "(traced)" in out
    assert "300 B tokens take" in out
    assert "at 2 a GPU and hour" in out
    assert "Times are predictions. Assumed: " in out


def test_a_run_that_does_not_fit_says_what_would_help(capsys):
    status = main(arguments("moe_1b", 8, "--memory-gib", "6", *SMALL))
    out = capsys.readouterr().out
    assert status == 1
    assert "does not fit: " in out
    assert "any one of these would make it fit:\n  --" in out
    assert "recommended: --" in out


def test_json_has_it_all(capsys):
    status = main(arguments("moe_1b", 16, "--json", "--price", "2", *SMALL))
    plan = json.loads(capsys.readouterr().out)
    assert status == (0 if plan["fits"] else 1)
    own = plan["own"]
    assert own["memory"]["source"] == "traced"
    assert sum(own["memory"]["bytes"].values()) == pytest.approx(own["memory"]["peak_bytes"])
    assert own["budget"]["cost"] == pytest.approx(2 * 16 * own["budget"]["seconds"] / 3600)
    parts = own["time"]["compute"] + own["time"]["gather"] + own["time"]["exchange"] + own["time"]["update"]
    assert own["time"]["step_s"] == pytest.approx(parts)
    assert 0 < own["mfu"] < 1
    assert plan["recommended"]["layout"]["gpus"] == 16
    assert set(plan["assumptions"]) == set(vars(Assumptions()))


def test_this_machine(capsys):
    assert main(arguments("quickstart", 2, gpu="cpu")) == 0
    out = capsys.readouterr().out
    assert "quickstart on 2 x cpu" in out
    assert "allocator" not in out
    assert this_cpu(2).memory_bytes == pytest.approx(this_cpu(1).memory_bytes / 2)


def test_settings_of_the_run_may_follow(capsys):
    assert main(arguments("quickstart", 1, "--steps", "123", "--json")) == 0
    config = run("quickstart")
    tokens_of_it = json.loads(capsys.readouterr().out)["own"]["budget"]["tokens"]
    assert tokens_of_it == 123 * config.batch.global_size * config.data.sequence_length


@pytest.mark.parametrize(
    "extra", [["--gpus", "0"], ["--gpus", "7", "--batch.global_size", "16"], ["--stepz", "3"], ["--gpus-per-node", "0"]]
)
def test_bad_input_is_told(capsys, extra):
    assert main(arguments("quickstart", 1, *extra)) == 2
    assert capsys.readouterr().err.startswith("plan: ")


def test_tokens_may_be_written_shortly(capsys):
    assert [tokens(text) for text in ("300B", "1.5t", "1e12", "7k", "20M")] == [3e11, 1.5e12, 1e12, 7e3, 2e7]
    with pytest.raises(SystemExit):
        main(arguments("quickstart", 1, "--tokens", "many"))
    assert "must be a number of tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(40, "40 s"), (600, "10 minutes"), (7200, "2.0 hours"), (8 * 86400, "8.0 days")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_stages_count_with_their_own_sizes():
    stages = (StageConfig(100, sequence_length=4096, global_size=64), StageConfig(150, global_size=32))
    config = run(
        "moe_1b", **{"steps": 200, "data.sequence_length": 2048, "batch.global_size": 128, "batch.micro_size": 2}
    )
    config = replace(config, data=replace(config.data, stages=stages), model=replace(config.model, context_length=4096))
    heavy = heaviest(config, 8)
    assert heavy.data.sequence_length == 4096
    own = layout_of(heavy, 8, 8)
    candidate = Candidate(own, estimate(heavy, own), step_time(heavy, own, H100, Assumptions()))
    whole = budget(config, candidate, H100, Assumptions(), None, None)
    assert whole.tokens == 100 * 128 * 2048 + 50 * 64 * 4096 + 50 * 32 * 4096
    assert whole.cost(8) is None
    half = budget(config, candidate, H100, Assumptions(), whole.tokens / 2, 3.0)
    assert half.seconds == pytest.approx(whole.seconds / 2)
    assert half.cost(8) == pytest.approx(3.0 * 8 * half.seconds / 3600)
