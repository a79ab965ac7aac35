"""Batches for training (for evaluation: evaluation.py). Shapes: B batch (sequences of a micro-batch), T time.

What a step trains on depends on (seed, step, datasets) alone: not on ranks, micro-batches or where a run was interrupted.
There are no worker processes: rows are copied out of the mapped files in microseconds, and because the order is computed,
the rows of later steps can be asked for before they are needed.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from grist_data.batch import IGNORE, Batch
from grist_data.evaluation import evaluation_batches
from grist_data.mixture import Mixture, Setting
from grist_data.order import Plan
from grist_data.packed_shards import PackedShards, packed
from grist_data.run_ahead import RunAhead
from grist_data.shards import Shards
from grist_data.stages import StagedOrder
from grist_data.steps import Step, Steps, check_steps, setting_at
from grist_data.supply import Supply

__all__ = ["IGNORE", "Batch", "Batches", "evaluation_batches"]

Packing = Literal["none", "best-fit"]
_STEPS_ASKED = 16  # cold disk: 11 M tokens/s without reading ahead, 141 with 16 batches
_STEPS_MADE_ON_CUDA = 2


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
    packing: `best-fit` puts whole documents side by side into rows instead of cutting windows out of the text (packing.py):
    always with `cu_seqlens`, and no target from one document to the next; what stays empty is a stretch of its own, without
    targets. packing_cache: where the plan of it is kept (default: ~/.cache/gristmill/packing).
    prefetch: so many steps are made ahead by a thread; 0 for none, None for 2 on CUDA and 0 elsewhere.
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
        packing: Packing = "none",
        packing_cache: str | Path | None = None,
        prefetch: int | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), but is {rank}")
        if prefetch is not None and prefetch < 0:
            raise ValueError(f"prefetch must be a number of steps from 0, but is {prefetch}")
        mixture = shards if isinstance(shards, Mixture) else Mixture({shards.split: shards}, {shards.split: 1.0})
        self._settings = mixture.resolved(sequence_length, global_batch_size, micro_batch_size)
        self._rank, self._world_size = rank, world_size
        for setting in self._settings:
            where = f" from position {setting.start} on" if setting.start else ""
            share = _divided(setting.global_batch_size, world_size, f"global_batch_size{where}", "world_size")
            micro = setting.micro_batch_size or share
            _divided(share, micro, f"the rank's share of the batch{where}", "micro_batch_size")
        if packing not in get_args(Packing):
            raise ValueError(f"packing must be one of {', '.join(get_args(Packing))}, but is {packing!r}")
        if packing != "none":
            if stride is not None or jitter:
                raise ValueError("stride and jitter are for windows: leave them out with packing")
            mixture = packed(mixture, self._settings, seed, shuffle, packing_cache)
            jitter, documents, ignore_next_document = False, True, True
        unit = mixture.unit(self._settings)
        plan = Plan(seed, unit, stride or unit, shuffle if jitter is None else jitter, shuffle, packing)
        self._sources = tuple(mixture.sources.values())
        self.order = StagedOrder(mixture, self._settings, plan)
        self.samples_per_epoch = sum(self.order.windows().values())
        device, rows = torch.device(device), self.order.rows
        most_tokens = max(self._share(setting) * (setting.sequence_length + 1) for setting in self._settings)
        self._supply_of = functools.partial(Supply, self.order, device, documents, ignore_next_document)
        self._supply = self._supply_of(most_tokens)
        self._prefetch = prefetch if prefetch is not None else _STEPS_MADE_ON_CUDA if device.type == "cuda" else 0
        self._asked = 0 if rows.reads_whole else _STEPS_ASKED
        self._ahead: RunAhead | None = None
        self._seek(0)
        rows.expect("random" if shuffle else "sequential")

    @property
    def position(self) -> int:
        """Samples that have been handed out, over all ranks."""
        return self._pos

    @property
    def sequence_length(self) -> int:
        return setting_at(self._settings, self._pos).sequence_length

    @property
    def global_batch_size(self) -> int:
        return setting_at(self._settings, self._pos).global_batch_size

    @property
    def micro_batch_size(self) -> int:
        setting = setting_at(self._settings, self._pos)
        return setting.micro_batch_size or self._share(setting)

    @property
    def epoch(self) -> float:
        """Passes over the split that have been handed out; of a mixture, over the source that was read most often."""
        return max(self.order.epochs(self._pos).values())

    @property
    def padding_share(self) -> float:
        """Of the places in an epoch of every source, those without a token; 0 without packing."""
        packs = [source for source in self._sources if isinstance(source, PackedShards)]
        places = sum(len(pack.bins) * pack.sequence_length for pack in packs)
        return 1 - sum(pack.n_tokens for pack in packs) / places if packs else 0.0

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> list[Batch]:
        try:
            step, batches, ready = self._thread().take() if self._prefetch else _make(self._steps, self._supply)
        except BaseException:
            self._seek(self._pos)  # the next call tries this step again, and the state is where it was
            raise
        self._pos += step.setting.global_batch_size
        return self._supply.hand_over(batches, ready)

    def at(self, positions: np.ndarray, offsets: np.ndarray | None = None) -> Batch:
        """The samples at any positions of the order as one batch; `state_dict` stays as it is.

        positions: int64. offsets: what `order.offsets` gives for them, where it is known.
        Raises ValueError where a stage makes the rows differ in length.
        """
        settings = [setting_at(self._settings, position) for position in positions.tolist()]
        if len({setting.sequence_length for setting in settings}) > 1:
            raise ValueError(f"the sequence_length changes between positions {positions.min()} and {positions.max()}")
        offsets = self.order.offsets(positions) if offsets is None else offsets
        step = Step(positions, replace(settings[0], micro_batch_size=None), offsets)
        # Not `_supply`: its buffers may be the thread's, and are for a share of a step.
        supply = self._supply_of(len(positions) * (settings[0].sequence_length + 1))
        return supply.hand_over(*supply.batches(step))[0]

    def skip(self, steps: int) -> None:
        """Go on so many steps later, without reading those between."""
        self.close()
        for _ in range(steps):
            self._pos += next(self._steps).setting.global_batch_size

    def close(self) -> None:
        """End the thread that runs ahead, where there is one, and drop what it has made. The next call of `next` goes on."""
        if self._ahead is not None:
            self._seek(self._pos)

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands after the last batch handed out: valid for any rank, world size and batch size, and with any
        stages from there on.
        """
        return self.state_at(self._pos)

    def state_at(self, pos: int) -> dict[str, Any]:
        """The state of this order when `pos` samples have been handed out."""
        dataset_id, plan = self.order.identity(pos)
        return {"pos": pos, "dataset_id": dataset_id, "plan": plan}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when it belongs to other datasets or another order."""
        if state.keys() != self.state_at(0).keys() or not isinstance(state["pos"], int) or state["pos"] < 0:
            raise ValueError(f"not a data position: expected pos >= 0, dataset_id and plan, but got {state}")
        own = self.state_at(state["pos"])
        if state["dataset_id"] != own["dataset_id"]:
            raise ValueError(
                f"the run was reading dataset {state['dataset_id']}, but here its first {state['pos']:,} samples come from"
                f" {own['dataset_id']}: resume with the dataset it began with, or begin a new run from its weights"
            )
        if state["plan"] != own["plan"]:
            raise ValueError(
                f"the run read its first {state['pos']:,} samples in another order: seed, sequence_length, stride or shuffle"
                " differ, or jitter, packing, unit_tokens, or weights and stages before that position (plan"
                f" {state['plan'][:12]}, now {own['plan'][:12]}); resume with the settings it began with, or begin a new run"
                " from its weights"
            )
        check_steps(self._settings, state["pos"])
        self._seek(state["pos"])

    def _seek(self, pos: int) -> None:
        """Go on at a position, with nothing made ahead."""
        if self._ahead is not None:
            self._stop_thread()
            self._ahead = None
        self._pos = pos
        self._steps = Steps(self.order, self._settings, self._rank, self._world_size, pos, self._asked)

    def _thread(self) -> RunAhead:
        """What runs ahead; begun when it is first needed, and again in a process that was forked off."""
        if self._ahead is None or not self._ahead.is_here:
            self._seek(self._pos)
            self._ahead = RunAhead(functools.partial(_make, self._steps, self._supply), self._prefetch)
            self._stop_thread = weakref.finalize(self, self._ahead.stop)  # at exit too
        return self._ahead

    def _share(self, setting: Setting) -> int:
        return setting.global_batch_size // self._world_size


def _make(steps: Steps, supply: Supply) -> tuple[Step, list[Batch], Any]:
    """The next step, its micro-batches, and the event after which they are there."""
    step = next(steps)
    return step, *supply.batches(step)


def _divided(total: int, parts: int, total_name: str, parts_name: str) -> int:
    if total < 1 or parts < 1 or total % parts:
        raise ValueError(f"{total_name} ({total}) must be a positive multiple of {parts_name} ({parts})")
    return total // parts
