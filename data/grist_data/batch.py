"""One micro-batch, and where documents end in it. Shapes: B batch (sequences of a micro-batch), T time (sequence length)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

IGNORE = -100


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


def cu_seqlens_of(ends: list[np.ndarray], n_rows: int, T: int) -> tuple[np.ndarray, int]:
    """Document borders of rows laid end to end, int32, and the longest stretch. ends: by row, in flat numbers."""
    borders = np.unique(np.concatenate([np.arange(n_rows + 1) * T, *ends])).astype(np.int32)
    return borders, int(np.diff(borders).max())


def batch_of(
    rows: torch.Tensor, device: torch.device, ends: list[np.ndarray] | None, ignored: np.ndarray | None
) -> Batch:
    """A batch of rows of T + 1 tokens.

    rows: (B, T + 1) of the files' integer type. ends: by row, where documents end, in flat numbers; None for no `cu_seqlens`.
    ignored: flat numbers of the targets that do not count, each once; None when all count.
    """
    ids_BT = rows[:, :-1].to(torch.int64).to(device)
    targets_BT = rows[:, 1:].to(torch.int64).to(device)
    n_valid = targets_BT.numel()
    if ignored is not None:
        targets_BT.view(-1)[torch.from_numpy(ignored).to(targets_BT.device)] = IGNORE
        n_valid -= len(ignored)
    if ends is None:
        return Batch(ids_BT, targets_BT, None, n_valid)
    cu_seqlens, longest = cu_seqlens_of(ends, *ids_BT.shape)
    return Batch(ids_BT, targets_BT, torch.from_numpy(cu_seqlens).to(targets_BT.device), n_valid, longest)
