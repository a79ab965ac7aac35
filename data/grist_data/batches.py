"""Batches for training and evaluation. Shapes: B batch (sequences of a micro-batch), T time (sequence length).

What a step trains on depends on (seed, step, dataset) alone: not on ranks, micro-batches or where a run was interrupted.
There are no worker processes: rows are copied out of the mapped files in microseconds, and because the order is computed,
the rows of later steps can be asked for before they are needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from grist_data.order import Order, Plan
from grist_data.shards import Shards

IGNORE = -100
_POSITIONS_AT_ONCE = 4096  # a permuted id costs 0.3 microseconds in blocks of this size, 40 in blocks of 8
_STEPS_AHEAD = 16  # cold disk: 11 M tokens/s without reading ahead, 141 with 16 batches
_RING = 4


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    ids_BT: (B, T) int64. targets_BT: (B, T) int64, the next token of each; -100 does not count.
    cu_seqlens: None, or (documents + 1,) int32: where documents begin in the B*T tokens laid end to end (a row's begin is
    one too), and B*T at the end. max_seqlen: the longest such stretch. n_valid_tokens: targets that count.
    """

    ids_BT: torch.Tensor
    targets_BT: torch.Tensor
    cu_seqlens: torch.Tensor | None
    n_valid_tokens: int
    max_seqlen: int | None = None


class Batches:
    """Endless training batches: `next()` gives one optimizer step, the micro-batches of this rank.

    A step is `global_batch_size` consecutive positions of the order; rank r takes the r-th share. Epochs follow each other
    without a gap: within one, every window comes exactly once.

    sequence_length: T. micro_batch_size: B, a divisor of the rank's share; None takes the whole share at once.
    seed: of the order. shuffle: False reads in file order, with windows that always begin at the same tokens.
    stride: tokens between the beginnings of windows, T by default; less gives overlapping samples.
    documents: give `cu_seqlens`, so that attention stays inside documents. ignore_next_document: a document's last token
    does not have the next document's first as target.
    Raises ValueError for sizes that do not divide and for a split without a single window.
    """

    def __init__(
        self,
        shards: Shards,
        sequence_length: int,
        global_batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
        device: torch.device | str = "cpu",
        shuffle: bool = True,
        stride: int | None = None,
        documents: bool = False,
        ignore_next_document: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), but is {rank}")
        share = _divided(global_batch_size, world_size, "global_batch_size", "world_size")
        self.micro_batch_size = micro_batch_size or share
        _divided(share, self.micro_batch_size, "the rank's share of the batch", "micro_batch_size")
        plan = Plan(seed, sequence_length, stride or sequence_length, jitter=shuffle, shuffle=shuffle)
        windows = shards.windows(plan.sequence_length, plan.stride, plan.jitter)
        if not len(windows):
            raise ValueError(
                f"the {shards.split} split of {shards.directory} is shorter than one sample: it has {shards.n_tokens:,} tokens,"
                f" and sequence_length {sequence_length} needs {sequence_length + 1:,} in one shard; use a shorter"
                " sequence_length or more text"
            )
        self.shards, self.sequence_length, self.global_batch_size = shards, sequence_length, global_batch_size
        self.samples_per_epoch = len(windows)
        self._order = Order(windows, plan, f"{shards.dataset_id}/{shards.split}")
        self._plan_digest = plan.digest()
        self._share, self._first = share, rank * share
        self._documents, self._ignore_next_document = documents, ignore_next_document
        self._device = torch.device(device)
        self._supply = _Supply(shards, share, sequence_length + 1, self._device)
        self._ahead = 0 if shards.reads_whole else _STEPS_AHEAD
        self._seek(0)
        shards.expect("random" if shuffle else "sequential")

    @property
    def epoch(self) -> float:
        """Passes over the split that have been handed out."""
        return self._pos / self.samples_per_epoch

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> list[Batch]:
        while len(self._queue) <= self._ahead:
            self._queue.append(self._next_offsets())
            if self._ahead:
                self.shards.will_need(self._queue[-1], self.sequence_length + 1)
        offsets = self._queue.popleft()
        self._pos += self.global_batch_size
        rows = self._supply.rows(offsets)
        step = range(0, self._share, self.micro_batch_size)
        return [
            self._batch(rows[at : at + self.micro_batch_size], offsets[at : at + self.micro_batch_size]) for at in step
        ]

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands after the last batch handed out: valid for any rank, world size and batch size."""
        return {"pos": self._pos, "dataset_id": self.shards.dataset_id, "plan": self._plan_digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when it belongs to another dataset or order."""
        own = self.state_dict()
        if state.keys() != own.keys() or not isinstance(state["pos"], int) or state["pos"] < 0:
            raise ValueError(f"not a data position: expected pos >= 0, dataset_id and plan, but got {state}")
        if state["dataset_id"] != own["dataset_id"]:
            raise ValueError(
                f"the run was reading dataset {state['dataset_id']}, but {self.shards.directory} holds {own['dataset_id']}:"
                " resume with the dataset it began with, or begin a new run from its weights"
            )
        if state["plan"] != own["plan"]:
            raise ValueError(
                "the run read its data in another order: seed, sequence_length, stride or shuffle differ (plan"
                f" {state['plan'][:12]}, now {own['plan'][:12]}); resume with the settings it began with, or begin a new run"
                " from its weights"
            )
        self._seek(state["pos"])

    def _seek(self, pos: int) -> None:
        self._pos = self._planned = pos
        self._queue: deque[np.ndarray] = deque()
        self._block: deque[np.ndarray] = deque()

    def _next_offsets(self) -> np.ndarray:
        """Windows of the next step of this rank, computed for many steps at once."""
        if not self._block:
            steps = max(1, _POSITIONS_AT_ONCE // self._share)
            begins = self._planned + np.arange(steps, dtype=np.int64) * self.global_batch_size + self._first
            positions = begins[:, None] + np.arange(self._share)
            self._block.extend(self._order.offsets(positions.ravel()).reshape(steps, self._share))
            self._planned += steps * self.global_batch_size
        return self._block.popleft()

    def _batch(self, rows: torch.Tensor, offsets: np.ndarray) -> Batch:
        """rows: (B, T + 1) of the file's integer type."""
        ids_BT = rows[:, :-1].to(torch.int64).to(self._device)
        targets_BT = rows[:, 1:].to(torch.int64).to(self._device)
        if not (self._documents or self._ignore_next_document):
            return Batch(ids_BT, targets_BT, None, targets_BT.numel())
        T = self.sequence_length
        ends = [row * T + self._ends_in(offset) for row, offset in enumerate(offsets.tolist())]
        valid = targets_BT.numel()
        if self._ignore_next_document:
            last_tokens = np.concatenate(ends) - 1
            targets_BT.view(-1)[torch.from_numpy(last_tokens).to(targets_BT.device)] = IGNORE
            valid -= len(last_tokens)
        if not self._documents:
            return Batch(ids_BT, targets_BT, None, valid)
        cu_seqlens, longest = _cu_seqlens(ends, len(offsets), T)
        return Batch(ids_BT, targets_BT, torch.from_numpy(cu_seqlens).to(targets_BT.device), valid, longest)

    def _ends_in(self, offset: int) -> np.ndarray:
        """Document ends in 1 to T, relative to the window: an end at T divides its last input from the target."""
        return self.shards.document_ends(offset, self.sequence_length + 1)


def evaluation_batches(
    shards: Shards,
    sequence_length: int,
    batch_size: int,
    *,
    stride: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    max_tokens: int | None = None,
    documents: bool = False,
) -> Iterator[Batch]:
    """Every token of the split after the first, as a target exactly once, in finitely many batches of (B, T).

    Window k begins at token k * stride and scores the targets that no earlier window scored, so with stride < T all but the
    first have at least T - stride tokens before them. All ranks get the same number of batches of the same shape: what is
    missing at the end is filled with masked rows.

    stride: T by default. max_tokens: score only the first so many targets. documents: give `cu_seqlens`.
    Raises ValueError for a split of fewer than two tokens or a stride outside 1 to T.
    """
    stride = stride or sequence_length
    if not 1 <= stride <= sequence_length:
        raise ValueError(f"stride must lie in 1 to sequence_length ({sequence_length}), but is {stride}")
    if not 0 <= rank < world_size or batch_size < 1:
        raise ValueError(f"need 0 <= rank < world_size and batch_size >= 1, but got {rank}, {world_size}, {batch_size}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, but is {max_tokens}; leave it out to score the whole split")
    n_targets = shards.n_tokens - 1
    if n_targets < 1:
        raise ValueError(
            f"the {shards.split} split of {shards.directory} has no token to predict: {n_targets + 1} in all"
        )
    n_targets = min(n_targets, max_tokens or n_targets)
    n_windows = 1 + -(-max(0, n_targets - sequence_length) // stride)
    return _evaluate(
        shards, sequence_length, batch_size, stride, rank, world_size, device, documents, n_targets, n_windows
    )


def _evaluate(
    shards: Shards,
    T: int,
    batch_size: int,
    stride: int,
    rank: int,
    world_size: int,
    device: torch.device | str,
    documents: bool,
    n_targets: int,
    n_windows: int,
) -> Iterator[Batch]:
    filler = shards.eot_id or 0
    at_once = batch_size * world_size
    n_steps = -(-n_windows // at_once)
    for first in range(rank * batch_size, n_steps * at_once, at_once):
        ids_BT = np.full((batch_size, T), filler, np.int64)
        targets_BT = np.full((batch_size, T), IGNORE, np.int64)
        ends = [np.zeros(0, np.int64)] * batch_size
        for row, window in enumerate(range(first, min(first + batch_size, n_windows))):
            begin = window * stride
            n = min(T, n_targets - begin)
            tokens = shards.read(begin, n + 1)
            ids_BT[row, :n] = tokens[:-1]
            scored_before = T - stride if window else 0
            targets_BT[row, scored_before:n] = tokens[1 + scored_before :]
            if documents:
                ends[row] = row * T + shards.document_ends(begin, n)
        cu_seqlens, longest = _cu_seqlens(ends, batch_size, T) if documents else (None, None)
        yield Batch(
            torch.from_numpy(ids_BT).to(device),
            torch.from_numpy(targets_BT).to(device),
            None if cu_seqlens is None else torch.from_numpy(cu_seqlens).to(device),
            int((targets_BT != IGNORE).sum()),
            longest,
        )


class _Supply:
    """Copies windows out of the files into reused buffers and onto the device, as small as they are on disk."""

    def __init__(self, shards: Shards, rows: int, width: int, device: torch.device) -> None:
        self._shards, self._device, self._turn = shards, device, 0
        on_gpu = device.type == "cuda"
        dtype = torch.uint16 if shards.dtype.itemsize == 2 else torch.int32  # ids stay below 2^31
        self._buffers = [
            torch.empty(rows, width, dtype=dtype, pin_memory=on_gpu) for _ in range(_RING if on_gpu else 1)
        ]
        self._copied: list[Any] = [torch.cuda.Event() for _ in self._buffers] if on_gpu else []

    def rows(self, offsets: np.ndarray) -> torch.Tensor:
        """(len(offsets), width) tokens on the device (for MPS on the CPU); valid until the ring comes round."""
        k = self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[k]
        if self._copied:
            self._copied[k].synchronize()  # the copy out of this buffer, four steps ago
        self._shards.gather(offsets, buffer.numpy().view(self._shards.dtype))
        if not self._copied:
            return buffer
        on_device = buffer.to(self._device, non_blocking=True)
        self._copied[k].record()
        return on_device


def _cu_seqlens(ends: list[np.ndarray], n_rows: int, T: int) -> tuple[np.ndarray, int]:
    """Document borders of rows laid end to end, int32, and the longest stretch. ends: by row, in flat numbers."""
    borders = np.unique(np.concatenate([np.arange(n_rows + 1) * T, *ends])).astype(np.int32)
    return borders, int(np.diff(borders).max())


def _divided(total: int, parts: int, total_name: str, parts_name: str) -> int:
    if total < 1 or parts < 1 or total % parts:
        raise ValueError(f"{total_name} ({total}) must be a positive multiple of {parts_name} ({parts})")
    return total // parts
