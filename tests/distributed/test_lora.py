"""Adapters trained on one rank and on two: the same losses, stop and resume included, and checkpoints of adapters only."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import tiny_house
import torch
import torch.multiprocessing as mp
from adapter_families import adapted
from tiny_run import losses, write_run
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import DeviceMesh

import grist_model
from grist_data.prepare import prepare
from grist_model.moe import Experts
from grist_train.__main__ import main
from grist_train.config import load
from grist_train.expert_parallel import distribute_experts

STEPS = 10


def _run(folder: Path, **changes) -> Path:
    """A run on the model in `folder / base`; its name is that of the folder."""
    settings = {
        "initial": str(folder.parent / "base"),
        "lora": {"rank": 3, "alpha": 12.0},
        "optimizer": {"name": "adamw", "lr": 0.03},
        "batch": {"global_size": 8, "micro_size": 4},
        "checkpoint": {"every": 0, "asynchronous": False},
        "evaluate": {"every": 0},
        "model": {"balance": "bias"},
        "sample": {"prompts": []},
        **changes,
    }
    return write_run(folder, steps=STEPS, **settings)


def _on_a_rank(rank: int, ranks: int, port: int, run: str, overrides: dict) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), **address}
    main(load(run, **overrides))


def _train(run: Path, ranks: int, **overrides) -> None:
    if ranks == 1:
        main(load(run, **overrides))
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_on_a_rank, (ranks, port, str(run), overrides), nprocs=ranks)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dataset and a model with its tokenizer, and a finished run on one rank."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "one").mkdir()
    run = _run(folder / "one")
    settings = load(run).data.prepare
    assert settings is not None
    prepare(replace(settings, out=str(folder / "one/dataset")))
    torch.manual_seed(0)
    base = tiny_house.model(300, context_length=32, layers=2, balance="bias")
    grist_model.save(base, folder / "base")
    shutil.copy(folder / "one/dataset/tokenizer.json", folder / "base")
    _train(run, 1)
    return folder


def _assert_same(got: dict[int, float], want: dict[int, float]) -> None:
    assert sorted(got) == sorted(want) == list(range(1, STEPS + 1))
    worst = max(abs(got[step] - want[step]) / want[step] for step in want)
    assert worst < 1e-5, f"losses differ by {worst:.2e} relative"


def test_the_run_learns_and_its_checkpoint_holds_adapters_only(place):
    found = losses(place / "one")
    assert found[STEPS] < found[1] - 0.2
    entries = FileSystemReader(place / f"one/runs/tiny/checkpoints/step-{STEPS}").read_metadata().state_dict_metadata
    names = {name.removeprefix("model.") for name in entries if name.startswith("model.")}
    assert {name for name in names if ".adapters." not in name} == {
        f"blocks.{i}.mlp.router.selection_bias" for i in (0, 1)
    }
    assert len(names) == 2 + 2 * 2 * 6
    merged, base = grist_model.load(place / "one/runs/tiny/model"), grist_model.load(place / "base")
    for name, tensor in base.state_dict().items():
        adapted = name.endswith(("q.weight", "k.weight", "v.weight", "o.weight", "w_gate_up", "w_down"))
        assert torch.equal(merged.state_dict()[name], tensor) != adapted, name


def test_two_ranks_are_one_and_go_on_as_one(place, tmp_path):
    folder = place / "two"
    folder.mkdir()
    shutil.copytree(place / "one/dataset", folder / "dataset")
    run = _run(folder, data={"directory": str(folder / "dataset"), "prepare": None})
    _train(run, 2, stop_at=5)
    _train(run, 1)
    _assert_same(losses(folder), losses(place / "one"))


def test_checkpointed_activations_change_nothing(place):
    run = place / "one/run.yaml"
    _train(run, 1, name="again", **{"compute.activation_checkpointing": "block"})
    _assert_same(losses(place / "one", "again"), losses(place / "one"))


def test_a_run_goes_on_from_an_adapter(place):
    """Half a run, and the other half from the adapter it left: another optimizer state, but the same function."""
    run = place / "one/run.yaml"
    _train(run, 1, name="more", steps=1, **{"lora.initial": str(place / "one/runs/tiny/adapter")})
    _train(run, 1, name="full", steps=1, initial=str(place / "one/runs/tiny/model"), lora=None)
    assert losses(place / "one", "more")[1] == pytest.approx(losses(place / "one", "full")[1], rel=1e-5)


def test_a_run_does_not_go_on_beside_other_weights(place):
    run = place / "one/run.yaml"
    _train(run, 1, name="stopped", stop_at=1)
    base = grist_model.load(place / "base")
    with torch.no_grad():
        base.norm.weight.mul_(1.1)
    grist_model.save(base, place / "other")
    shutil.copy(place / "base/tokenizer.json", place / "other")
    with pytest.raises(SystemExit, match=r"hold adapters of other weights than .*other has now"):
        _train(run, 1, name="stopped", initial=str(place / "other"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial": None}, "lora adapts a model that is there"),
        ({"optimizer.name": "muon"}, "optimizer.name is muon: set it to adamw"),
        ({"lora.targets": ["gate"]}, "names gate, which this model does not have"),
    ],
)
def test_what_does_not_fit_is_refused(place, changes, message):
    with pytest.raises(SystemExit, match=message):
        _train(place / "one/run.yaml", 1, name="refused", **changes)


def test_experts_with_adapters_are_not_shared_out():
    experts = adapted("gpt_oss").blocks[0].get_submodule("mlp.experts")
    assert isinstance(experts, Experts)
    with pytest.raises(ValueError, match=r"compute\.expert_parallel does not share adapters of experts out"):
        distribute_experts(experts, cast(DeviceMesh, None))
