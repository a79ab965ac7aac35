"""One micro-batch, and where documents end in it. Shapes: B batch (sequences of a micro-batch), T time (sequence length)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """What a DataLoader with pin_memory=True calls."""
        return self._with(torch.Tensor.pin_memory)

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        cu_seqlens = None if self.cu_seqlens is None else change(self.cu_seqlens)
        return replace(self, ids_BT=change(self.ids_BT), targets_BT=change(self.targets_BT), cu_seqlens=cu_seqlens)

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self.ids_BT, self.targets_BT, self.cu_seqlens) if tensor is not None]


def cu_seqlens_of(ends: Sequence[np.ndarray], n_rows: int, T: int) -> tuple[np.ndarray, int]:
    """Document borders of rows laid end to end, int32, and the longest stretch. ends: flat numbers, in any order."""
    is_border = np.zeros(n_rows * T + 1, bool)  # marks: a tenth of the time of sorting
    is_border[::T] = True
    for some in ends:
        is_border[some] = True
    borders = np.flatnonzero(is_border)
    return borders.astype(np.int32), int((borders[1:] - borders[:-1]).max())


def batch_of(ids_BT: torch.Tensor, targets_BT: torch.Tensor, borders: np.ndarray | None, n_valid_tokens: int) -> Batch:
    """borders: where documents end, in flat numbers; None for no `cu_seqlens`."""
    if borders is None:
        return Batch(ids_BT, targets_BT, None, n_valid_tokens)
    cu_seqlens, longest = cu_seqlens_of([borders], *ids_BT.shape)
    return Batch(ids_BT, targets_BT, torch.from_numpy(cu_seqlens).to(ids_BT.device), n_valid_tokens, longest)
