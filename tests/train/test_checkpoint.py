"""Resumable checkpoints: whole or absent, pruned, and intact when the disk is not."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_house import small
from torch.distributed.checkpoint import FileSystemWriter

import grist_model
from grist_train import checkpoint_files, distributed, optimizer
from grist_train.checkpoint import CheckpointError, Checkpoints
from grist_train.checkpoint_manifest import MANIFEST_FILE
from grist_train.config import OptimizerConfig
from grist_train.guard import StorageError


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


def store(directory, world, asynchronous=False, keep_last=2, **settings) -> Checkpoints:
    return Checkpoints(directory, world, keep_last, asynchronous, **settings)


def saved(directory, world, steps: tuple[int, ...], **settings) -> Checkpoints:
    """Checkpoints of one model at each of these steps."""
    checkpoints = store(directory, world, keep_last=len(steps), **settings)
    model, optimizers = trained()
    for step in steps:
        checkpoints.save(step, model, optimizers, {})
        assert checkpoints.wait()
    return checkpoints


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path, world, asynchronous):
    model, optimizers = trained(seed=1)
    checkpoints = store(tmp_path, world, asynchronous)
    checkpoints.save(7, model, optimizers, {"batches": {"pos": 42}})
    want = {name: value.clone() for name, value in model.state_dict().items()}
    for p in model.parameters():  # an asynchronous save must have copied before training goes on
        p.data.add_(1.0)
    assert checkpoints.wait()

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


def test_permanent_ones_are_kept_besides(tmp_path, world):
    model, optimizers = trained()
    checkpoints = store(tmp_path, world, keep_last=1, keep_every=4)
    for step in range(2, 13, 2):
        checkpoints.save(step, model, optimizers, {"validation_loss": 1.0 if step == 6 else 2.0})
        assert checkpoints.wait()
    assert checkpoints.steps() == [4, 6, 8, 12]


def test_a_crash_while_an_old_one_is_removed_leaves_no_half_and_forgets_no_best(tmp_path, world, monkeypatch, capsys):
    model, optimizers = trained()
    checkpoints = store(tmp_path, world, keep_last=1)
    checkpoints.save(1, model, optimizers, {"validation_loss": 3.0})
    assert checkpoints.wait()

    def crash(path, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shutil, "rmtree", lambda path, **kwargs: None if kwargs else crash(path))
    checkpoints.save(2, model, optimizers, {"validation_loss": 1.0})
    assert checkpoints.wait(), "the new one is whole"
    assert "an old checkpoint could not be removed" in capsys.readouterr().err
    monkeypatch.undo()
    again = store(tmp_path, world, keep_last=1)
    assert again.steps() == [2]
    assert not list(tmp_path.glob(".step-*"))
    again.save(3, model, optimizers, {"validation_loss": 2.0})
    assert again.wait()
    assert again.best() == {"step": 2, "validation_loss": 1.0}
    assert again.steps() == [2, 3]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def tensors_of(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.distcp"))


DAMAGE = {
    "flipped": (lambda at: flip(tensors_of(at)), "__0_0.distcp: its bytes are not those that were written"),
    "torn": (lambda at: os.truncate(tensors_of(at), 100), "__0_0.distcp: has 100 bytes, but"),
    "missing": (lambda at: (at / ".metadata").unlink(), ".metadata: is missing"),
    "other state": (lambda at: (at / "state.json").write_text('{"format": 2, "step": 1}'), "state.json: has 24 bytes"),
    "other manifest": (lambda at: flip(at / MANIFEST_FILE), MANIFEST_FILE),
    "no manifest": (lambda at: (at / MANIFEST_FILE).write_text("[]"), f"{MANIFEST_FILE}: cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_it_is_used(tmp_path, world, capsys, kind):
    saved(tmp_path, world, (1, 2, 3))
    damage, words = DAMAGE[kind]
    damage(tmp_path / "step-3")
    again = store(tmp_path, world)
    state = again.newest()
    assert state is not None
    assert state["step"] == 2
    said = capsys.readouterr().err
    assert f"step-3 is damaged: {words}" in said
    assert f"what is left of this one is in {tmp_path / 'damaged-step-3'}" in said
    assert again.steps() == [1, 2]
    model, optimizers = trained()
    again.save(3, model, optimizers, {})
    assert again.wait()
    assert again.steps() == [2, 3]


def test_without_a_whole_one_nothing_begins_anew(tmp_path, world):
    saved(tmp_path, world, (1, 2))
    for step in (1, 2):
        flip(tensors_of(tmp_path / f"step-{step}"))
    for _ in range(2):  # a launcher would try again
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
            store(tmp_path, world).newest()


def test_a_run_without_checkpoints_has_no_newest(tmp_path, world):
    assert store(tmp_path, world).newest() is None


def test_damage_is_noticed_by_whoever_loads(tmp_path, world):
    checkpoints = saved(tmp_path, world, (1,))
    flip(tensors_of(tmp_path / "step-1"))
    model, optimizers = trained()
    with pytest.raises(CheckpointError, match="step-1 is damaged"):
        checkpoints.load(1, model, optimizers)
    with pytest.raises(CheckpointError, match="step-1 is damaged"):
        checkpoints.load_weights(1, model)


def test_less_is_verified_on_request(tmp_path, world):
    saved(tmp_path, world, (1, 2))
    flip(tensors_of(tmp_path / "step-2"))
    sizes = store(tmp_path, world, verify="size").newest()
    assert sizes is not None
    assert sizes["step"] == 2
    os.truncate(tensors_of(tmp_path / "step-2"), 100)
    nothing = store(tmp_path, world, verify="none").newest()
    assert nothing is not None
    assert nothing["step"] == 2
    sizes = store(tmp_path, world, verify="size").newest()
    assert sizes is not None
    assert sizes["step"] == 1


def test_a_checkpoint_of_an_earlier_version_loads(tmp_path, world):
    saved(tmp_path, world, (1,))
    (tmp_path / "step-1" / MANIFEST_FILE).unlink()
    model, optimizers = trained()
    assert store(tmp_path, world).load(1, model, optimizers)["step"] == 1


def test_the_manifest_lists_every_other_file(tmp_path, world):
    saved(tmp_path, world, (1,))
    listed = json.loads((tmp_path / "step-1" / MANIFEST_FILE).read_text())["files"]
    there = {path.name: path.stat().st_size for path in (tmp_path / "step-1").iterdir() if path.name != MANIFEST_FILE}
    assert {name: entry["bytes"] for name, entry in listed.items()} == there


@pytest.mark.parametrize("asynchronous", [False, True])
def test_disk_that_fills_up_in_the_middle_of_writing(tmp_path, world, capsys, asynchronous):
    saved(tmp_path, world, (1,))
    model, optimizers = trained()
    checkpoints = store(tmp_path, world, asynchronous)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (tensors_of(tmp_path / "step-1").stat().st_size // 2, before[1]))
    try:
        checkpoints.save(2, model, optimizers, {})
        assert not checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step-2 could not be written" in capsys.readouterr().err
    assert not list(tmp_path.glob(".step-*"))
    state = store(tmp_path, world).newest()
    assert state is not None
    assert state["step"] == 1


def test_several_failures_in_a_row_end_the_run(tmp_path, world, monkeypatch):
    model, optimizers = trained()
    checkpoints = store(tmp_path, world, max_failures=2)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for step, works in ((1, True), (2, False), (3, True), (4, False)):
        if not works:
            monkeypatch.setattr(FileSystemWriter, "write_data", full)
        checkpoints.save(step, model, optimizers, {})
        assert checkpoints.wait() == works, "one that succeeds in between starts the count anew"
        monkeypatch.undo()
    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    checkpoints.save(5, model, optimizers, {})
    with pytest.raises(StorageError, match="2 checkpoints in a row could not be written"):
        checkpoints.wait()
    assert checkpoints.steps() == [1, 3]


def test_a_directory_that_vanishes_is_made_again(tmp_path, world):
    checkpoints = saved(tmp_path / "checkpoints", world, (1,))
    shutil.rmtree(tmp_path / "checkpoints")
    model, optimizers = trained()
    checkpoints.save(2, model, optimizers, {})
    assert checkpoints.wait()
    assert checkpoints.steps() == [2]


def test_a_directory_that_cannot_be_is_said(tmp_path, world, capsys):
    checkpoints = saved(tmp_path / "checkpoints", world, (1,))
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("in the way")
    model, optimizers = trained()
    checkpoints.save(2, model, optimizers, {})
    assert not checkpoints.wait()
    assert "Valid checkpoints: none" in capsys.readouterr().err
    with pytest.raises(StorageError, match="checkpoints cannot be written to"):
        store(tmp_path / "checkpoints", world)


@pytest.mark.parametrize("fails", [False, True])
def test_the_copy_in_memory_is_freed(tmp_path, world, monkeypatch, fails):
    copies: list[weakref.ref] = []
    copy = checkpoint_files.Writer.copy

    def remembered(writer, tensors):
        copied = copy(writer, tensors)
        copies.extend(weakref.ref(each) for each in copied["model"].values())
        return copied

    monkeypatch.setattr(checkpoint_files.Writer, "copy", remembered)
    model, optimizers = trained()
    checkpoints = store(tmp_path if not fails else tmp_path / "checkpoints", world, asynchronous=True)
    if fails:
        (tmp_path / "checkpoints").rmdir()
        (tmp_path / "checkpoints").write_text("in the way")
    for step in (1, 2):
        checkpoints.save(step, model, optimizers, {})
        assert sum(ref() is not None for ref in copies) <= len(model.state_dict()), "one copy at a time"
    assert checkpoints.wait() != fails
    gc.collect()
    assert not [ref for ref in copies if ref() is not None]


def test_pinned_memory_is_refused_without_cuda(tmp_path, world):
    with pytest.raises(ValueError, match=r"checkpoint\.pinned is for copies from CUDA, but this run is on cpu"):
        store(tmp_path, world, asynchronous=True, pinned=True)


@pytest.mark.gpu
def test_a_pinned_copy_is_made_anew_for_every_checkpoint(tmp_path, world):
    on_cuda = replace(world, device=torch.device("cuda", 0))
    model, optimizers = trained()
    model.cuda()
    checkpoints = store(tmp_path, on_cuda, asynchronous=True, keep_last=3, pinned=True)
    wanted = []
    for step in (1, 2, 3):
        checkpoints.save(step, model, optimizers, {})
        wanted.append({name: value.clone() for name, value in model.state_dict().items()})
        for parameter in model.parameters():
            parameter.data.add_(1.0)
        assert checkpoints.wait()
    for step in (1, 2, 3):
        checkpoints.load_weights(step, model)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, wanted[step - 1][name], rtol=0, atol=0, msg=name)


def test_a_copy_that_does_not_fit_in_memory_is_a_failure(tmp_path, world, monkeypatch, capsys):
    model, optimizers = trained()
    checkpoints = store(tmp_path, world, asynchronous=True)

    def no_memory(writer, tensors):
        raise RuntimeError("cannot allocate memory")

    monkeypatch.setattr(checkpoint_files.Writer, "copy", no_memory)
    checkpoints.save(1, model, optimizers, {})
    assert not checkpoints.wait()
    assert "cannot allocate memory" in capsys.readouterr().err


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
