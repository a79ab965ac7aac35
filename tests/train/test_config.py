"""Runs from YAML and the command line: typed, complete, and helpful when a key is wrong."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from grist_model.config import ModelConfig
from grist_train.config import EveryBlocks, TrainConfig, load, parse, to_dict

ROOT = Path(__file__).resolve().parents[2]
RUNS = sorted((ROOT / "train" / "runs").glob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_every_run_file_is_valid(path):
    config = load(path)
    assert config.name == path.stem
    assert isinstance(config.model, ModelConfig)


def test_override_beats_the_file():
    config = load(RUNS[0], **{"optimizer.lr": 0.123, "steps": 7, "sample.prompts": ["a", "b"]})
    assert config.optimizer.lr == 0.123
    assert config.steps == 7
    assert tuple(config.sample.prompts) == ("a", "b")


def test_resolved_config_reads_back(tmp_path):
    config = load(ROOT / "train" / "runs" / "gpt_oss_20b.yaml")
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    assert load(path) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer.lrr", "1"], "did you mean `optimizer.lr`"),
        (["--lr", "1"], "did you mean `optimizer.lr`"),
        (["--model.expert=3"], "did you mean `model.experts`"),
        (["--config", "no/such/file.yaml"], "no such run file: no/such/file.yaml"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--data.prepare.source", "fils"], "unknown source 'fils'"),
        (["--model.heads", "3", "--model.kv_heads", "2"], "heads"),
        (["--model.active_experts", "9", "--model.experts", "4"], "active_experts"),
        (["--data.sequence_length", "4096"], "longer than model.context_length"),
        (["--checkpoint.portable", "best", "--checkpoint.every", "30", "--evaluate.every", "20"], "multiple of"),
    ],
)
def test_wrong_input_says_what_to_do(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(arguments)
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_unknown_key_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optimizer:\n  learning_rate: 1.0\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"unknown key `optimizer.learning_rate` in .*run.yaml"):
        parse(["--config", str(path)])


def test_yaml_cannot_make_objects(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="not valid YAML"):
        parse(["--config", str(path)])


def test_help_lists_keys_without_loading_torch():
    code = (
        "import sys\nfrom grist_train.config import parse\n"
        "try: parse(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=python_env(), check=True
    )
    assert done.stdout.rstrip().endswith("False"), f"--help took {time.perf_counter() - start:.1f} s and loaded torch"
    assert "--optimizer.muon_lr" in done.stdout


def python_env() -> dict[str, str]:
    import os

    paths = [str(ROOT / folder) for folder in ("kernels", "model", "data", "train", "eval", "tools")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def test_defaults_make_a_run():
    assert TrainConfig().run_dir == Path("runs/run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"initial": None}, "name its directory as `initial`"),
        ({"data": {"sequence_length": 64}}, "preferences stand instead of data"),
        ({"preferences": {"paths": []}}, "need either paths"),
        ({"preferences": {"paths": ["x"], "contrast": {"source": "shakespeare_dialogues"}}}, "need either paths"),
        ({"preferences": {"paths": ["x"], "beta": 0.0}}, "beta must be above 0"),
        ({"preferences": {"paths": ["x"], "label_smoothing": 0.5}}, "below 0.5"),
        ({"preferences": {"paths": ["x"], "sft_weight": -1.0}}, "sft_weight must be at least 0"),
        ({"preferences": {"paths": ["x"], "max_tokens": 1}}, "max_tokens must be at least 2"),
        ({"preferences": {"paths": ["x"], "max_pairs": 0}}, "max_pairs must be at least 1"),
        ({"preferences": {"paths": ["x"], "val_fraction": 1.0}}, "below 1"),
    ],
)
def test_preferences_that_cannot_be_meant_are_refused(tmp_path, changes, words):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"initial": "somewhere", "preferences": {"paths": ["x"]}, **changes}))
    with pytest.raises(SystemExit, match=words):
        parse(["--config", str(path)])


def test_activation_checkpointing_is_a_word_or_every_so_many(tmp_path):
    path = tmp_path / "run.yaml"
    for text, want in (("block", "block"), ("selective", "selective"), ("{every: 3}", EveryBlocks(3))):
        path.write_text(f"compute:\n  activation_checkpointing: {text}\n", encoding="utf-8")
        config = load(path)
        assert config.compute.activation_checkpointing == want
        path.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
        assert load(path) == config
    assert parse(["--compute.activation_checkpointing.every", "2"]).compute.activation_checkpointing == EveryBlocks(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compute.replicate", "0"], "compute.replicate must be at least 1, but is 0"),
        (["--compute.context_parallel", "-2"], "compute.context_parallel must be at least 1, but is -2"),
        (["--compute.activation_checkpointing.every", "0"], "activation_checkpointing.every must be at least 1"),
        (["--compute.activation_checkpointing", "blocks"], "blocks"),
    ],
)
def test_layouts_that_no_number_of_ranks_fits_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(arguments)
    assert message in f"{error.value} {capsys.readouterr().err}"
