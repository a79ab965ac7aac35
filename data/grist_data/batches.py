"""Batches for training (for evaluation: evaluation.py). Shapes: B batch (sequences of a micro-batch), T time.

What a step trains on depends on (seed, step, datasets) alone: not on ranks, micro-batches or where a run was interrupted.
There are no worker processes: rows are copied out of the mapped files in microseconds, and because the order is computed,
the rows of later steps can be asked for before they are needed.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch

from grist_data.batch import IGNORE, Batch, batch_of
from grist_data.evaluation import evaluation_batches
from grist_data.mixture import Mixture, Setting
from grist_data.order import Plan
from grist_data.shards import Shards
from grist_data.stages import StagedOrder
from grist_data.supply import Supply

__all__ = ["IGNORE", "Batch", "Batches", "evaluation_batches"]

_POSITIONS_AT_ONCE = (
    4096  # of each source: a permuted id costs 0.3 microseconds in blocks of this size, 40 in blocks of 8
)
_MOST_AT_ONCE = 32768  # a pause of some 20 ms, every so many rows
_STEPS_AHEAD = 16  # cold disk: 11 M tokens/s without reading ahead, 141 with 16 batches


class _Step(NamedTuple):
    """The rows of one step on this rank: position of the first, and where each begins in the files."""

    position: int
    setting: Setting
    offsets: np.ndarray


class Batches:
    """Endless training batches: `next()` gives one optimizer step, the micro-batches of this rank.

    A step is `global_batch_size` consecutive positions of the order; rank r takes the r-th share. Epochs follow each other
    without a gap: within one, every window comes exactly once.

    shards: a split of a dataset, or a Mixture of several. Its stages may change the three sizes that are given here; the
    attributes of these names are those of the next step.
    sequence_length: T. micro_batch_size: B, a divisor of the rank's share; None takes the whole share at once.
    seed: of the order. shuffle: False reads in file order, with windows that always begin at the same tokens.
    jitter: other cuts in every epoch; None for yes when shuffling.
    stride: tokens between the beginnings of windows (units, where stages have several lengths), as many as they have by
    default; less gives overlapping samples.
    documents: give `cu_seqlens`, so that attention stays inside documents. ignore_next_document: a document's last token
    does not have the next document's first as target.
    order: where each position comes from, and when each window is read (stages.py).
    Raises ValueError for sizes that do not divide, for a split without a single window, and before the first step where a later
    one would have rows of two lengths.
    """

    def __init__(
        self,
        shards: Shards | Mixture,
        sequence_length: int,
        global_batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
        device: torch.device | str = "cpu",
        shuffle: bool = True,
        jitter: bool | None = None,
        stride: int | None = None,
        documents: bool = False,
        ignore_next_document: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), but is {rank}")
        mixture = shards if isinstance(shards, Mixture) else Mixture({shards.split: shards}, {shards.split: 1.0})
        self._settings = mixture.resolved(sequence_length, global_batch_size, micro_batch_size)
        self._rank, self._world_size = rank, world_size
        for setting in self._settings:
            where = f" from position {setting.start} on" if setting.start else ""
            share = _divided(setting.global_batch_size, world_size, f"global_batch_size{where}", "world_size")
            micro = setting.micro_batch_size or share
            _divided(share, micro, f"the rank's share of the batch{where}", "micro_batch_size")
        unit = mixture.unit(self._settings)
        plan = Plan(seed, unit, stride or unit, shuffle if jitter is None else jitter, shuffle)
        self.order = StagedOrder(mixture, self._settings, plan)
        self.samples_per_epoch = sum(self.order.windows().values())
        self._documents, self._ignore_next_document = documents, ignore_next_document
        self._device = torch.device(device)
        most_tokens = max(self._share(setting) * (setting.sequence_length + 1) for setting in self._settings)
        self._supply = Supply(self.order.rows, most_tokens, self._device)
        self._ahead = 0 if self.order.rows.reads_whole else _STEPS_AHEAD
        self._seek(0)
        self.order.rows.expect("random" if shuffle else "sequential")

    @property
    def sequence_length(self) -> int:
        return self._setting(self._pos).sequence_length

    @property
    def global_batch_size(self) -> int:
        return self._setting(self._pos).global_batch_size

    @property
    def micro_batch_size(self) -> int:
        setting = self._setting(self._pos)
        return setting.micro_batch_size or self._share(setting)

    @property
    def epoch(self) -> float:
        """Passes over the split that have been handed out; of a mixture, over the source that was read most often."""
        return max(self.order.epochs(self._pos).values())

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> list[Batch]:
        while len(self._queue) <= self._ahead:
            step = self._next_step()
            self._queue.append(step)
            if self._ahead:
                self.order.rows.will_need(step.offsets, step.setting.sequence_length + 1)
        step = self._queue.popleft()
        self._pos += step.setting.global_batch_size
        rows = self._supply.rows(step.offsets, step.setting.sequence_length + 1)
        micro = step.setting.micro_batch_size or len(rows)
        return [self._batch(step, rows, at, at + micro) for at in range(0, len(rows), micro)]

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands after the last batch handed out: valid for any rank, world size and batch size, and with any
        stages from there on.
        """
        return self._state(self._pos)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when it belongs to other datasets or another order."""
        if state.keys() != self._state(0).keys() or not isinstance(state["pos"], int) or state["pos"] < 0:
            raise ValueError(f"not a data position: expected pos >= 0, dataset_id and plan, but got {state}")
        own = self._state(state["pos"])
        if state["dataset_id"] != own["dataset_id"]:
            raise ValueError(
                f"the run was reading dataset {state['dataset_id']}, but here its first {state['pos']:,} samples come from"
                f" {own['dataset_id']}: resume with the dataset it began with, or begin a new run from its weights"
            )
        if state["plan"] != own["plan"]:
            raise ValueError(
                f"the run read its first {state['pos']:,} samples in another order: seed, sequence_length, stride or shuffle"
                " differ, or jitter, unit_tokens, or weights and stages before that position (plan"
                f" {state['plan'][:12]}, now {own['plan'][:12]}); resume with the settings it began with, or begin a new run"
                " from its weights"
            )
        self._check_steps(state["pos"])
        self._seek(state["pos"])

    def _state(self, pos: int) -> dict[str, Any]:
        dataset_id, plan = self.order.identity(pos)
        return {"pos": pos, "dataset_id": dataset_id, "plan": plan}

    def _seek(self, pos: int) -> None:
        self._pos = self._planned = pos
        self._queue: deque[_Step] = deque()
        self._block: deque[_Step] = deque()

    def _setting(self, pos: int) -> Setting:
        return [setting for setting in self._settings if setting.start <= pos][-1]

    def _share(self, setting: Setting) -> int:
        return setting.global_batch_size // self._world_size

    def _steps_left(self, pos: int) -> int | None:
        """Steps that begin before the next stage does; None when there is none."""
        starts = [setting.start for setting in self._settings if setting.start > pos]
        return -(-(starts[0] - pos) // self._setting(pos).global_batch_size) if starts else None

    def _check_steps(self, pos: int) -> None:
        """Raise ValueError when a step from `pos` on would go over a change of the sequence length."""
        while steps := self._steps_left(pos):
            now = self._setting(pos)
            begin, pos = pos, pos + steps * now.global_batch_size
            for later in self._settings:
                if begin < later.start < pos and later.sequence_length != now.sequence_length:
                    raise ValueError(
                        f"sequence_length changes to {later.sequence_length} at position {later.start}, inside a step: steps of"
                        f" {now.global_batch_size} samples from position {begin} on have edges at"
                        f" {pos - now.global_batch_size} and {pos}; move the stage to one, or change the batch size"
                    )

    def _next_step(self) -> _Step:
        """The next step of this rank, computed for many steps at once."""
        if not self._block:
            self._check_steps(self._planned)  # not when made: a run that is resumed may fit its stages from there only
            setting = self._setting(self._planned)
            share = self._share(setting)
            steps = max(1, min(_POSITIONS_AT_ONCE * len(setting.weights), _MOST_AT_ONCE) // share)
            steps = min(steps, self._steps_left(self._planned) or steps)
            begins = self._planned + self._rank * share + np.arange(steps, dtype=np.int64) * setting.global_batch_size
            positions = begins[:, None] + np.arange(share)
            offsets = self.order.offsets(positions.ravel()).reshape(steps, share)
            self._block.extend(map(_Step, begins.tolist(), [setting] * steps, offsets))
            self._planned += steps * setting.global_batch_size
        return self._block.popleft()

    def _batch(self, step: _Step, rows: torch.Tensor, begin: int, end: int) -> Batch:
        """The micro-batch of the rows [begin, end) of a step."""
        T = step.setting.sequence_length
        ignored, ends = [], None
        if self.order.masked:
            for row, position in enumerate(range(step.position + begin, step.position + end)):
                if targets := self.order.masked.get(position):
                    ignored.append(row * T + np.arange(targets))
        if self._documents or self._ignore_next_document:
            # Ends in 1 to T: an end at T divides a row's last input from its target.
            offsets = step.offsets[begin:end].tolist()
            ends = [row * T + self.order.rows.document_ends(offset, T + 1) for row, offset in enumerate(offsets)]
            if self._ignore_next_document:
                ignored += [of_row - 1 for of_row in ends]
        masked = np.unique(np.concatenate(ignored)) if ignored else None
        return batch_of(rows[begin:end], self._device, ends if self._documents else None, masked)


def _divided(total: int, parts: int, total_name: str, parts_name: str) -> int:
    if total < 1 or parts < 1 or total % parts:
        raise ValueError(f"{total_name} ({total}) must be a positive multiple of {parts_name} ({parts})")
    return total // parts
