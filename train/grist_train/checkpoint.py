"""Resumable checkpoints: `checkpoints/step-N`, written by torch.distributed.checkpoint, made valid by one rename.

A checkpoint holds tensors (what is trained of the parameters, buffers, optimizer state) in DCP's sharded format, everything
else in `state.json`, and in `manifest.json` what its files are, by which it is verified before it is used.
It is written under `.step-N.partial`; a folder called `step-N` is therefore always whole. It loads on any number of ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from grist_train.checkpoint_files import (
    FAILURES,
    STATE_FILE,
    CheckpointError,
    Writer,
    from_all,
    peers,
    reason,
    settled,
    sync_directory,
    write_json,
)
from grist_train.checkpoint_manifest import problems
from grist_train.distributed import World, barrier, sum_on_host
from grist_train.guard import StorageError

__all__ = ["CheckpointError", "Checkpoints", "write_json"]

FORMAT = 2
_ANOTHER = "another rank failed"


@dataclass
class Pending:
    """A checkpoint that is being written."""

    step: int
    future: Future[str | None]


@dataclass
class Checkpoints:
    """The checkpoint folder of a run. Every method that takes a model is collective, and so are `newest`, `poll` and `wait`.

    Attributes:
        directory: `RUN/checkpoints`.
        keep_last: Newest checkpoints that are kept; the best one is kept besides.
        asynchronous: Write in a background thread; one at a time, from one copy in host memory.
        keep_every: Checkpoints of multiples of this step are kept for good.
        verify: What is compared with the manifest before a checkpoint is loaded.
        max_failures: Writes in a row that may fail before `wait` raises.
        pinned: Copy to page-locked memory that is kept; for CUDA.
    """

    directory: Path
    world: World
    keep_last: int
    asynchronous: bool
    keep_every: int | None = None
    verify: Literal["full", "size", "none"] = "full"
    max_failures: int = 3
    pinned: bool = False
    pending: Pending | None = field(default=None, init=False)
    failures: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.world.is_main:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                for leftover in self.directory.glob(".step-*.partial"):
                    shutil.rmtree(leftover)
            except OSError as error:
                raise StorageError(f"checkpoints cannot be written to {self.directory}: {error}") from error
        barrier(self.world)
        self._writer = Writer(self.world, self.asynchronous, self.pinned)
        self._verified: set[int] = set()

    def steps(self) -> list[int]:
        """Steps of the checkpoints, oldest first."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.directory.glob("step-*"))
        return sorted(int(match.group(1)) for match in found if match)

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step}"

    def save(self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
        """Begin to write `step-N`, after finishing the one under way.

        `state` goes to `state.json`; when it has a `validation_loss`, the lowest one seen marks the best checkpoint.
        Raises what `wait` raises.
        """
        self.wait()
        is_there = False
        if self.world.is_main:  # one rank looks: others may still see what was there before, on a network's storage
            is_there = step in self.steps()
            shutil.rmtree(self._partial(step), ignore_errors=True)
        if sum_on_host([int(is_there)], self.world)[0]:
            return
        problem, copied = None, {}
        try:
            copied = self._writer.copy(_tensors(model, optimizers))
        except Exception as error:  # no host memory, say: the others must not wait for this rank in their threads
            problem = reason(error)
        if sum_on_host([int(problem is not None)], self.world)[0]:
            future = settled(problem or _ANOTHER)
        else:
            future = self._writer.begin(self._partial(step), copied, {"format": FORMAT, "step": step, **state})
        self.pending = Pending(step, future)

    def poll(self) -> None:
        """Publish a checkpoint whose writing has ended on all ranks; never blocks on the disk."""
        if self.pending is None:
            return
        done = sum_on_host([int(self.pending.future.done())], self.world)[0]
        if done == self.world.size:
            self.wait()

    def wait(self) -> bool:
        """Finish the checkpoint under way. Returns False, after saying why, when it could not be written.

        A failure (a full disk, say) leaves the checkpoints before it as they were, and training may go on. Raises StorageError
        for the last of `max_failures` in a row.
        """
        if self.pending is None:
            return True
        pending, self.pending = self.pending, None
        problem = self._publish(pending)
        if not sum_on_host([int(problem is not None)], self.world)[0]:
            self.failures = 0
            return True
        self.failures += 1
        if self.world.is_main:
            shutil.rmtree(self._partial(pending.step), ignore_errors=True)
            kept = ", ".join(f"step-{s}" for s in self.steps()) or "none"
            print(
                f"warning: checkpoint step-{pending.step} could not be written: {problem or _ANOTHER}. "
                f"Valid checkpoints: {kept}",
                file=sys.stderr,
            )
        if self.failures >= self.max_failures:
            raise StorageError(
                f"{self.failures} checkpoints in a row could not be written to {self.directory} (checkpoint.max_failures "
                f"{self.max_failures}): make room or mend the storage, then run the same command again"
            )
        return False

    def _publish(self, pending: Pending) -> str | None:
        """Why the checkpoint is not there, or None; `wait` makes it known on every rank."""
        problem = pending.future.result()
        if problem is not None or not self.world.is_main:
            return problem
        try:
            os.rename(self._partial(pending.step), self.path(pending.step))
            sync_directory(self.directory)
        except OSError as error:
            return reason(error)
        try:
            self._prune()
        except OSError as error:
            print(f"warning: an old checkpoint could not be removed: {error}", file=sys.stderr)
        return None

    def _partial(self, step: int) -> Path:
        return self.directory / f".step-{step}.partial"

    def _prune(self) -> None:
        best = self.best()
        for step in self.steps()[: -self.keep_last]:
            kept_for_good = self.keep_every is not None and step % self.keep_every == 0
            if not kept_for_good and (best is None or step != best["step"]):
                doomed = self._partial(step)  # a half-deleted checkpoint must not look valid
                os.rename(self.path(step), doomed)
                shutil.rmtree(doomed)

    def best(self) -> dict[str, Any] | None:
        """`{"step", "validation_loss"}` of the best checkpoint that is there, the earliest of equal ones; None where none has
        a validation loss. Their own files say so: a note beside them would be missing after a crash between the two."""
        found = [(loss, step) for step in self.steps() if (loss := self._validation_loss(step)) is not None]
        return {"step": min(found)[1], "validation_loss": min(found)[0]} if found else None

    def _validation_loss(self, step: int) -> float | None:
        try:
            return json.loads((self.path(step) / STATE_FILE).read_text(encoding="utf-8")).get("validation_loss")
        except (OSError, ValueError):  # damaged, which loading it would say: not the best of anything
            return None

    def newest(self) -> dict[str, Any] | None:
        """`state.json` of the newest checkpoint that is as it was written, or None in a run that has no checkpoint.

        Damaged ones that are newer are named and set aside as `damaged-step-N`, on all ranks alike. Raises CheckpointError
        where none is whole.
        """
        steps = from_all(self.steps(), self.world, self.world.host_group)[0]
        damaged: list[int] = []
        for step in reversed(steps):
            found = self._problems(step)
            if not found:
                self._set_aside(damaged)
                return self.read_state(step)
            damaged.append(step)
            if self.world.is_main:
                print(f"warning: {self.path(step)} is damaged: {'; '.join(found)}", file=sys.stderr)
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.directory} is whole ({len(damaged)} damaged, see above). Restore one from a copy, or "
                "use another --name to begin again; --checkpoint.verify none loads the newest as it is"
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """A damaged checkpoint must make room for the one that will be written at the same step."""
        for step in steps if self.world.is_main else []:
            aside = self.directory / f"damaged-step-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(self.path(step), aside)
            print(
                f"warning: going on from an earlier checkpoint; what is left of this one is in {aside}", file=sys.stderr
            )
        barrier(self.world)

    def _problems(self, step: int) -> list[str]:
        """What is wrong with a checkpoint, as all ranks found it together."""
        if self.verify == "none" or step in self._verified:
            return []
        mine = problems(self.path(step), self.verify, self.world.rank, self.world.size)
        found = dict.fromkeys(each for rank in from_all(mine, self.world, self.world.host_group) for each in rank)
        if not found:
            self._verified.add(step)
        return list(found)

    def _require_whole(self, step: int) -> None:
        if found := self._problems(step):
            raise CheckpointError(f"{self.path(step)} is damaged: {'; '.join(found)}")

    def read_state(self, step: int) -> dict[str, Any]:
        """`state.json` of a checkpoint."""
        state = json.loads((self.path(step) / STATE_FILE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"{self.path(step)} has format {state['format']}, but this version reads format {FORMAT}"
            )
        return state

    def load(self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
        """Read a checkpoint into the model and the optimizers, resharding as needed; returns its `state.json`.

        Raises CheckpointError for one that is damaged, or is of another model.
        """
        self._require_whole(step)
        state = self.read_state(step)
        tensors = _tensors(model, optimizers)
        try:
            dcp.load(tensors, checkpoint_id=str(self.path(step)), **peers(self.world))
        except FAILURES as error:
            raise CheckpointError(
                f"{self.path(step)} does not fit this run ({reason(error)}). Use the configuration it was made with, "
                "or another --name for a fresh run"
            ) from error
        model.load_state_dict(tensors["model"], strict=False)
        set_optimizer_state_dict(model, optimizers, tensors["optimizer"], options=_OPTIONS)
        return state

    def load_weights(self, step: int, model: nn.Module) -> None:
        """Read only the parameters of a checkpoint, those that are trained. Raises CheckpointError for one that is damaged."""
        self._require_whole(step)
        tensors = {"model": _trained(model)}
        dcp.load(tensors, checkpoint_id=str(self.path(step)), **peers(self.world))
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
