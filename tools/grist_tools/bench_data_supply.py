"""Our own batches in the data benchmark: in a stream, with documents, from a mixture.

Rows are compared with the files, read by numpy alone at the offsets that the order gives. Shapes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grist_data import Batches, Shards
from grist_data.batch import Batch
from grist_data.mixture import Mixture
from grist_tools.bench_data_sets import ends_in_file, tokens_in_file
from grist_tools.bench_data_turns import Contestant

SEED = 0
WEIGHTS = (0.5, 0.3, 0.2)
CHECKED_STEPS = 20


@dataclass(frozen=True)
class Sizes:
    """B and T of a batch."""

    batch: int
    time: int

    @property
    def tokens(self) -> int:
        return self.batch * self.time

    def batches(self, source: Shards | Mixture, **options: Any) -> Batches:
        return Batches(source, self.time, self.batch, seed=SEED, **options)


def plain(split: Shards, sizes: Sizes) -> Contestant:
    """x and y, shuffled over the whole split."""

    def problem() -> str | None:
        batches = sizes.batches(split)
        windows = batches.samples_per_epoch
        distinct = len(np.unique(batches.order.offsets(np.arange(windows))))
        if distinct != windows:
            return f"an epoch has {windows} windows, but begins at {distinct} places"
        return _row_problem(batches, {split.split: split}, sizes)

    return Contestant(sizes.tokens, _drawing(sizes.batches(split)), problem)


def with_documents(split: Shards, sizes: Sizes) -> Contestant:
    """x, y, and where documents begin."""

    def problem() -> str | None:
        ends = ends_in_file(split)
        batches = sizes.batches(split, documents=True)
        for step in range(CHECKED_STEPS):
            offsets = _offsets(batches, step, sizes).tolist()
            found = next(batches)[0].cu_seqlens
            assert found is not None, "asked for"
            if not np.array_equal(found.numpy(), expected := _borders(offsets, ends, sizes)):
                return f"step {step}: documents begin at {expected.tolist()}, but cu_seqlens is {found.tolist()}"
        return _row_problem(sizes.batches(split, documents=True), {split.split: split}, sizes)

    return Contestant(sizes.tokens, _drawing(sizes.batches(split, documents=True)), problem)


def mixed(splits: Mapping[str, Shards], sizes: Sizes) -> Contestant:
    """x and y from three datasets by WEIGHTS."""
    weights = dict(zip(splits, WEIGHTS, strict=True))

    def problem() -> str | None:
        batches = sizes.batches(Mixture(splits, weights))
        samples = CHECKED_STEPS * sizes.batch
        drawn = np.bincount(batches.order.samples(np.arange(samples)).source, minlength=len(splits))
        for name, count in zip(batches.order.names, drawn.tolist(), strict=True):
            if abs(count - weights[name] * samples) >= 1:
                return f"source {name} gave {count} of {samples} samples, with a weight of {weights[name]}"
        return _row_problem(batches, splits, sizes)

    return Contestant(sizes.tokens, _drawing(sizes.batches(Mixture(splits, weights))), problem)


def _drawing(batches: Batches) -> Callable[[], list[Batch]]:
    return lambda: next(batches)


def _offsets(batches: Batches, step: int, sizes: Sizes) -> np.ndarray:
    return batches.order.offsets(step * sizes.batch + np.arange(sizes.batch))


def _row_problem(batches: Batches, splits: Mapping[str, Shards], sizes: Sizes) -> str | None:
    """Compare fresh batches with the files; what is wrong, or None."""
    for step in range(CHECKED_STEPS):
        if problem := batch_problem(next(batches)[0], batches, splits, step * sizes.batch):
            return f"step {step}: {problem}"
    return None


def batch_problem(batch: Batch, batches: Batches, splits: Mapping[str, Shards], position: int) -> str | None:
    """Compare one batch, whose first row is at `position`, with the files."""
    B, T = batch.ids_BT.shape
    positions = position + np.arange(B)
    offsets, sources = batches.order.offsets(positions), batches.order.samples(positions).source
    in_order = [splits[name] for name in batches.order.names]
    begins = np.cumsum([0, *(split.n_tokens for split in in_order)])
    for row, (offset, source) in enumerate(zip(offsets.tolist(), sources.tolist(), strict=True)):
        tokens = tokens_in_file(in_order[source], offset - int(begins[source]), T + 1)
        if not np.array_equal(batch.ids_BT[row].numpy(), tokens[:-1]):
            return f"x of row {row} is not what the file has at token {offset}"
        if not np.array_equal(batch.targets_BT[row].numpy(), tokens[1:]):
            return f"y of row {row} is not what the file has after token {offset}"
    return None


def _borders(offsets: Sequence[int], ends: np.ndarray, sizes: Sizes) -> np.ndarray:
    """cu_seqlens by definition: where a row or a document begins."""
    T = sizes.time
    borders = {row * T for row in range(sizes.batch + 1)}
    for row, offset in enumerate(offsets):
        inside = ends[(ends > offset) & (ends < offset + T)]
        borders |= {row * T + end - offset for end in inside.tolist()}
    return np.array(sorted(borders))
