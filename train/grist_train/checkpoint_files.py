"""The files of one checkpoint: tensors in torch.distributed.checkpoint's format, `state.json`, and the manifest of both."""

from __future__ import annotations

import gc
import json
import os
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from grist_train.checkpoint_manifest import MANIFEST_FILE, entries_of, manifest_of
from grist_train.distributed import World

# Whatever the storage raises. CheckpointException, which collects the errors of all ranks, is not an Exception.
FAILURES = (Exception, CheckpointException)
# DCP assumes that a save without a group was not meant; see `peers` for why it is.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
STATE_FILE = "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read, or does not fit the run."""


def peers(world: World) -> dict[str, Any]:
    """Who takes part. A single process must not use its group of one: copying the metadata in gloo's own threads starts
    a second pool of OpenMP threads, and with more threads than cores libgomp stops spinning: every step of a run on two
    cores then took 40 % longer.
    """
    return {"no_dist": True} if world.size == 1 else {"process_group": world.checkpoint_group}


def from_all(value: Any, world: World, group: dist.ProcessGroup) -> list[Any]:
    """A small host value of every rank, by rank, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=group)
    return values


class Writer:
    """Writes one checkpoint at a time; `begin` returns a future of its end.

    Asynchronously, tensors are copied to host memory by `copy`, and written from there by a thread. The copy is freed when it
    is written; with `pinned` it is page-locked, which a CUDA device copies to faster, and kept for the next checkpoint,
    because locking is slow.
    """

    def __init__(self, world: World, asynchronous: bool, pinned: bool) -> None:
        """Raises ValueError for pinned memory without CUDA."""
        if pinned and world.device.type != "cuda":
            raise ValueError(
                f"checkpoint.pinned is for copies from CUDA, but this run is on {world.device.type}: set it to false"
            )
        self._world = world
        self._pinned = DefaultStager(_PINNED) if pinned else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if asynchronous else None

    def copy(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """What may be written while training goes on; the tensors themselves when it does not."""
        if self._thread is None:
            return tensors
        stager = self._pinned or DefaultStager(_PLAIN)
        copied = stager.stage(tensors)
        assert isinstance(copied, dict)
        if stager is not self._pinned:
            stager.close()
        return copied

    def begin(self, directory: Path, tensors: dict[str, Any], state: dict[str, Any]) -> Future[str | None]:
        """Write what `copy` returned; the future has why that failed, or None. Every rank must come here."""
        if self._thread is not None:
            return self._thread.submit(_attempt, directory, tensors, state, self._world)
        return settled(_attempt(directory, tensors, state, self._world))


def settled(value: str | None) -> Future[str | None]:
    """A future that has ended."""
    future: Future[str | None] = Future()
    future.set_result(value)
    return future


def _attempt(directory: Path, tensors: dict[str, Any], state: dict[str, Any], world: World) -> str | None:
    """`write_files`, with the reason in place of an exception: that would hold its frames, and with them the copied tensors."""
    try:
        write_files(directory, tensors, state, world)
        return None
    except FAILURES as error:
        why = reason(error)
    gc.collect()  # DCP's own frames and exceptions hold each other, and the tensors too
    return why


_PLAIN = StagingOptions(
    use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
)
_PINNED = StagingOptions(
    use_pinned_memory=True, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=True
)


def write_files(directory: Path, tensors: dict[str, Any], state: dict[str, Any], world: World) -> None:
    """Tensors, then `state.json`, then the manifest; when it returns everything is on the disk.

    Raises whatever the storage raises, CheckpointError where it was another rank's. Collective, on the checkpoint's group.
    """
    dcp.save(tensors, checkpoint_id=str(directory), **peers(world))
    entries, problem = {}, None
    try:
        if world.is_main:
            write_json(directory / STATE_FILE, state)
        entries = entries_of(directory, world.rank, world.size)
    except OSError as error:  # the others wait for this rank's answer
        problem = f"rank {world.rank}: {type(error).__name__}: {error}"
    answers = from_all((entries, problem), world, world.checkpoint_group)
    failed = [each for _, each in answers if each is not None]
    if failed:
        raise CheckpointError(failed[0])
    if world.is_main:
        every_file = {name: entry for each, _ in answers for name, entry in each.items()}
        write_json(directory / MANIFEST_FILE, manifest_of(every_file))
        sync_directory(directory)


def reason(error: BaseException) -> str:
    """One line on what went wrong, from whichever rank it went wrong on."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync_directory(directory: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
