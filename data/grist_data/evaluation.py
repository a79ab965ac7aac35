"""Finite batches that score every token of a split once. Shapes: B batch (sequences), T time (sequence length)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from grist_data.batch import IGNORE, Batch, cu_seqlens_of
from grist_data.shards import Shards


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
    """Every token of the split after the first, as a target exactly once, in finitely many batches of (B, T). Under a loss mask
    only the trained tokens are targets.

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
            if shards.has_loss_mask:
                targets_BT[row, :n][~shards.trained(begin + 1, n)] = IGNORE
            if documents:
                ends[row] = row * T + shards.document_ends(begin, n)
        cu_seqlens, longest = cu_seqlens_of(ends, batch_size, T) if documents else (None, None)
        yield Batch(
            torch.from_numpy(ids_BT).to(device),
            torch.from_numpy(targets_BT).to(device),
            None if cu_seqlens is None else torch.from_numpy(cu_seqlens).to(device),
            int((targets_BT != IGNORE).sum()),
            longest,
        )
