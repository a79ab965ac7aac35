"""Resumable checkpoints: `checkpoints/step-N`, written by torch.distributed.checkpoint, made valid by one rename.

A checkpoint holds tensors (what is trained of the parameters, buffers, optimizer state) in DCP's sharded format and everything
else in `state.json`.
It is written under `.step-N.partial`; a folder called `step-N` is therefore always whole. It loads on any number of ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import warnings
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from grist_train.distributed import World, barrier, sum_on_host

# Whatever the storage raises. CheckpointException, which collects the errors of all ranks, is not an Exception.
FAILURES = (Exception, CheckpointException)
# DCP assumes that a save without a group was not meant; see `Checkpoints._peers` for why it is.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
STATE_FILE = "state.json"
FORMAT = 2


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not fit the run."""


@dataclass
class Pending:
    """A checkpoint that a background thread is writing."""

    step: int
    future: Future
    state: dict[str, Any]


@dataclass
class Checkpoints:
    """The checkpoint folder of a run.

    Attributes:
        directory: `RUN/checkpoints`.
        keep_last: Newest checkpoints that are kept; the best one is kept besides.
        asynchronous: Write in a background thread.
    """

    directory: Path
    world: World
    keep_last: int
    asynchronous: bool
    pending: Pending | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.world.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(".step-*.partial"):
                shutil.rmtree(leftover)
        barrier(self.world)

    def steps(self) -> list[int]:
        """Steps of the valid checkpoints, oldest first."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.directory.glob("step-*"))
        return sorted(int(match.group(1)) for match in found if match)

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step}"

    def save(self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
        """Begin to write `step-N`, after finishing the one under way.

        `state` goes to `state.json`; when it has a `validation_loss`, the lowest one seen marks the best checkpoint.
        """
        self.wait()
        if step in self.steps():
            return
        partial = self._partial(step)
        tensors = _tensors(model, optimizers)
        future: Future = Future()
        if self.asynchronous:
            response = dcp.async_save(tensors, checkpoint_id=str(partial), **self._peers())
            assert isinstance(response, Future)
            future = response
        else:
            try:
                dcp.save(tensors, checkpoint_id=str(partial), **self._peers())
                future.set_result(None)
            except FAILURES as error:
                future.set_exception(error)
        self.pending = Pending(step, future, {"format": FORMAT, "step": step, **state})

    def _peers(self) -> dict[str, Any]:
        """Who takes part. A single process must not use its group of one: copying the metadata in gloo's own threads starts
        a second pool of OpenMP threads, and with more threads than cores libgomp stops spinning: every step of a run on two
        cores then took 40 % longer.
        """
        return {"no_dist": True} if self.world.size == 1 else {"process_group": self.world.checkpoint_group}

    def poll(self) -> None:
        """Publish a checkpoint whose writing has ended on all ranks; never blocks on the disk."""
        if self.pending is None:
            return
        done = sum_on_host([int(self.pending.future.done())], self.world)[0]
        if done == self.world.size:
            self.wait()

    def wait(self) -> bool:
        """Finish the checkpoint under way. Returns False, after saying why, when it could not be written.

        A failure (a full disk, say) leaves the checkpoints before it as they were, and training may go on.
        """
        if self.pending is None:
            return True
        pending, self.pending = self.pending, None
        problem = self._publish(pending)
        failed = sum_on_host([int(problem is not None)], self.world)[0]
        if failed and self.world.is_main:
            shutil.rmtree(self._partial(pending.step), ignore_errors=True)
            kept = ", ".join(f"step-{s}" for s in self.steps()) or "none"
            print(
                f"warning: checkpoint step-{pending.step} could not be written: {_reason(problem)}. "
                f"Valid checkpoints: {kept}",
                file=sys.stderr,
            )
        return not failed

    def _publish(self, pending: Pending) -> BaseException | None:
        """The reason why the checkpoint is not there, or None; `wait` makes it known on every rank."""
        try:
            pending.future.result()
            if self.world.is_main:
                partial = self._partial(pending.step)
                write_json(partial / STATE_FILE, pending.state)
                os.rename(partial, self.path(pending.step))
                _sync_directory(self.directory)
                self._record_best(pending.state)
                self._prune()
        except FAILURES as error:
            return error
        return None

    def _partial(self, step: int) -> Path:
        return self.directory / f".step-{step}.partial"

    def _prune(self) -> None:
        best = self.best()
        for step in self.steps()[: -self.keep_last]:
            if best is None or step != best["step"]:
                doomed = self.directory / f".step-{step}.partial"  # a half-deleted checkpoint must not look valid
                os.rename(self.path(step), doomed)
                shutil.rmtree(doomed)

    def best(self) -> dict[str, Any] | None:
        """`{"step", "validation_loss"}` of the best checkpoint so far, if any was recorded and is still there."""
        path = self.directory / "best.json"
        if not path.is_file():
            return None
        best = json.loads(path.read_text(encoding="utf-8"))
        return best if self.path(best["step"]).is_dir() else None

    def _record_best(self, state: dict[str, Any]) -> None:
        loss, best = state.get("validation_loss"), self.best()
        if loss is not None and (best is None or loss < best["validation_loss"]):
            write_json(self.directory / "best.json", {"step": state["step"], "validation_loss": loss})

    def read_state(self, step: int) -> dict[str, Any]:
        """`state.json` of a checkpoint."""
        state = json.loads((self.path(step) / STATE_FILE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"{self.path(step)} has format {state['format']}, but this version reads format {FORMAT}"
            )
        return state

    def load(self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
        """Read a checkpoint into the model and the optimizers, resharding as needed; returns its `state.json`."""
        state = self.read_state(step)
        tensors = _tensors(model, optimizers)
        try:
            dcp.load(tensors, checkpoint_id=str(self.path(step)), **self._peers())
        except FAILURES as error:
            raise CheckpointError(
                f"{self.path(step)} does not fit this run ({_reason(error)}). Use the configuration it was made with, "
                "or another --name for a fresh run"
            ) from error
        model.load_state_dict(tensors["model"], strict=False)
        set_optimizer_state_dict(model, optimizers, tensors["optimizer"], options=_OPTIONS)
        return state

    def load_weights(self, step: int, model: nn.Module) -> None:
        """Read only the parameters of a checkpoint, those that are trained."""
        tensors = {"model": _trained(model)}
        dcp.load(tensors, checkpoint_id=str(self.path(step)), **self._peers())
        model.load_state_dict(tensors["model"], strict=False)


_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def _tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Everything that DCP stores. Keys are parameter names, so that they mean the same on any number of ranks."""
    optimizer = get_optimizer_state_dict(model, optimizers, options=_OPTIONS)
    return {"model": _trained(model), "optimizer": optimizer}


def _trained(model: nn.Module) -> dict[str, Any]:
    """The state dict without frozen parameters, which a run with adapters finds where it found them at first."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _reason(error: BaseException | None) -> str:
    """One line on what went wrong, from whichever rank it went wrong on."""
    if error is None:
        return "another rank failed"
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _sync_directory(directory: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
