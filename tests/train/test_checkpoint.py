"""Resumable checkpoints: whole or absent, pruned, and intact when the disk is not."""

from __future__ import annotations

import errno

import pytest
import torch
import torch.distributed as dist
from tiny_house import small
from torch.distributed.checkpoint import FileSystemWriter

import grist_model
from grist_train import checkpoint_files, distributed, optimizer
from grist_train.checkpoint import CheckpointError, Checkpoints
from grist_train.config import OptimizerConfig


@pytest.fixture(scope="module")
def world():
    yield distributed.start("cpu", threads=1)
    distributed.stop()


def trained(seed: int = 0, **shape):
    """A model whose optimizers have taken two steps."""
    model = grist_model.build(small(layers=1, **shape))
    grist_model.initialize(model, seed)
    optimizers = optimizer.build(model, OptimizerConfig())
    draw = torch.Generator().manual_seed(seed)
    for _ in range(2):
        ids = torch.randint(0, 64, (2, 16), generator=draw)
        torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    return model, optimizers


def store(directory, world, asynchronous=False, keep_last=2) -> Checkpoints:
    return Checkpoints(directory, world, keep_last, asynchronous)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path, world, asynchronous):
    model, optimizers = trained(seed=1)
    saved = store(tmp_path, world, asynchronous)
    saved.save(7, model, optimizers, {"batches": {"pos": 42}})
    want = {name: value.clone() for name, value in model.state_dict().items()}
    for p in model.parameters():  # an asynchronous save must have copied before training goes on
        p.data.add_(1.0)
    assert saved.wait()

    other, other_optimizers = trained(seed=2)
    state = store(tmp_path, world).load(7, other, other_optimizers)
    assert state["step"] == 7
    assert state["batches"] == {"pos": 42}
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=0, msg=name)
    for mine, theirs in zip(optimizers, other_optimizers, strict=True):
        for p, q in zip(mine.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
            for key, value in mine.state[p].items():
                torch.testing.assert_close(theirs.state[q][key], value, rtol=0, atol=0, msg=key)


def test_oldest_are_pruned_and_the_best_is_kept(tmp_path, world):
    model, optimizers = trained()
    checkpoints = store(tmp_path, world, keep_last=2)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        checkpoints.save(step, model, optimizers, {"validation_loss": loss})
        assert checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == {"step": 2, "validation_loss": 1.0}


def test_full_disk_leaves_the_last_checkpoint(tmp_path, world, monkeypatch, capsys):
    model, optimizers = trained()
    checkpoints = store(tmp_path, world)
    checkpoints.save(1, model, optimizers, {})
    assert checkpoints.wait()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    checkpoints.save(2, model, optimizers, {})
    assert not checkpoints.wait()
    said = capsys.readouterr().err
    assert "step-2 could not be written" in said
    assert "Valid checkpoints: step-1" in said
    assert checkpoints.steps() == [1]
    assert not list(tmp_path.glob(".step-*"))
    monkeypatch.undo()
    store(tmp_path, world).load(1, model, optimizers)
    checkpoints.save(3, model, optimizers, {})
    assert checkpoints.wait()


def test_disk_that_fills_up_at_the_very_end(tmp_path, world, monkeypatch):
    model, optimizers = trained()
    checkpoints = store(tmp_path, world)

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "write_json", full)
    checkpoints.save(1, model, optimizers, {})
    assert not checkpoints.wait()
    assert checkpoints.steps() == []


def test_leftovers_are_removed(tmp_path, world):
    (tmp_path / ".step-3.partial").mkdir()
    assert store(tmp_path, world).steps() == []
    assert not (tmp_path / ".step-3.partial").exists()


def test_other_shape_is_refused_by_name(tmp_path, world):
    model, optimizers = trained()
    checkpoints = store(tmp_path, world)
    checkpoints.save(1, model, optimizers, {})
    assert checkpoints.wait()
    other, other_optimizers = trained(width=32)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        checkpoints.load(1, other, other_optimizers)


def test_process_group_is_one_rank(world):
    assert dist.get_world_size() == world.size == 1
