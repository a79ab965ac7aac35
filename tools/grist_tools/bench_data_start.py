"""A run's beginning in the data benchmark: opening, resuming, memory of a fresh process, and files not in the page cache."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grist_data import Shards
from grist_data.batch import Batch
from grist_data.order import Windows
from grist_tools.bench_data_supply import CHECKED_STEPS, Sizes, batch_problem
from grist_tools.bench_data_turns import Row, Slice, rates
from grist_tools.timing import Call, alternate

_OWN_MEMORY_BATCHES = 1100  # with 8 rows, offsets are computed three times on the way
_FAR_EPOCHS = 10


def start_rows(directory: Path, sizes: Sizes, rounds: int) -> dict[str, Row]:
    """Milliseconds from nothing open to the first batch: at the beginning, and resumed far into a run."""
    before = sizes.batches(Shards.open(directory))
    for _ in range(CHECKED_STEPS):
        next(before)
    state, following = before.state_dict(), next(before)[0]
    far = {**state, "pos": _FAR_EPOCHS * before.samples_per_epoch + state["pos"]}

    def start(state: dict[str, Any] | None) -> Batch:
        batches = sizes.batches(Shards.open(directory))
        if state is not None:
            batches.load_state_dict(state)
        return next(batches)[0]

    resumed = start(state)
    wrong = None
    if not (torch.equal(resumed.ids_BT, following.ids_BT) and torch.equal(resumed.targets_BT, following.targets_BT)):
        wrong = f"the batch after resuming at {state['pos']} is not the one that follows without an interruption"
    elif problem := batch_problem(start(far), before, {"train": Shards.open(directory)}, far["pos"]):
        wrong = f"resumed at {far['pos']}: {problem}"
    if wrong:
        return {name: {"ok": False, "wrong": wrong} for name in ("open", "resume")}
    times = alternate({"open": Call(lambda: start(None)), "resume": Call(lambda: start(far))}, "cpu", rounds=rounds)
    return {
        name: {"ok": True, "unit": "ms", "value": found.median_ms, **found.as_json()} for name, found in times.items()
    }


def own_memory_row(directory: Path, sizes: Sizes) -> Row:
    """Bytes of anonymous memory that opening and reading add to a fresh process, at most; None where there is no /proc."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    if not Path("/proc/self/status").is_file():
        return {"ok": True, "unit": "bytes", "value": None, "why": "no /proc/self/status on this system"}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return {"ok": True, "unit": "bytes", "value": process.submit(_own_memory_bytes, directory, sizes).result()}


def _own_memory_bytes(directory: Path, sizes: Sizes) -> int:
    # What torch and numpy set up when they are first used is theirs.
    torch.zeros(64, dtype=torch.uint16).to(torch.int64)
    Windows([4096], 16, 16, jitter=True).offsets(np.arange(8), 1)
    gc.collect()
    before = _anonymous_bytes()
    batches = sizes.batches(Shards.open(directory))
    most = before
    for _ in range(_OWN_MEMORY_BATCHES):
        batch = next(batches)
        most = max(most, _anonymous_bytes())
        del batch
    return most - before


def _anonymous_bytes() -> int:
    return 1024 * _number_in("/proc/self/status", "RssAnon:")


def _number_in(file: str, key: str) -> int:
    with open(file, encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))


def cold_row(directory: Path, sizes: Sizes, seconds: float, rounds: int) -> Row:
    """Tokens a second from opening on, with the files dropped from the page cache before each round.

    A round is one epoch, or as much of one as comes in `seconds`. Nothing may have the files mapped: mapped pages stay.
    value None, and why: where the cache cannot be dropped (not Linux), or the files are not on a disk.
    """
    if not hasattr(os, "posix_fadvise") or not Path("/proc/self/io").is_file():
        return _not_cold("this system has no posix_fadvise or no /proc/self/io")
    gc.collect()
    slices, firsts_ms, amplification = [], [], []
    for _ in range(rounds):
        _drop_from_page_cache(directory)
        cpu_before = time.process_time()
        read_before, start = _number_in("/proc/self/io", "read_bytes:"), time.perf_counter()
        split = Shards.open(directory)
        batches = sizes.batches(split)
        times: list[float] = []
        first = next(batches)[0]
        now = time.perf_counter()
        firsts_ms.append(1e3 * (now - start))
        times.append(now - start)
        steps = batches.samples_per_epoch // sizes.batch
        last = first
        while len(times) < steps and now < start + seconds:
            last = next(batches)[0]
            before, now = now, time.perf_counter()
            times.append(now - before)
        cpu_seconds = time.process_time() - cpu_before
        read = _number_in("/proc/self/io", "read_bytes:") - read_before
        if not read:
            return _not_cold("nothing was read from a disk: the files are in memory (tmpfs), or mapped elsewhere")
        for step, batch in ((0, first), (len(times) - 1, last)):
            if problem := batch_problem(batch, batches, {split.split: split}, step * sizes.batch):
                return {"ok": False, "wrong": f"step {step}: {problem}"}
        slices.append(Slice(times, cpu_seconds))
        wanted = len(times) * sizes.batch * (sizes.time + 1) * split.dtype.itemsize
        amplification.append(read / wanted)
        del batches, split
        gc.collect()
    return {
        "ok": True,
        **rates(slices, sizes.tokens),
        "first_batch_ms": float(np.median(firsts_ms)),
        "bytes_read_over_wanted": float(np.median(amplification)),
    }


def _not_cold(why: str) -> Row:
    return {"ok": True, "unit": "tokens/s", "value": None, "why": why}


def _drop_from_page_cache(directory: Path) -> None:
    for path in sorted(directory.glob("*.tok")):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # only clean pages can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
