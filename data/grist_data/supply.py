"""Steps to batches: rows of tokens out of the mapped files, widened to int64, with their masks, on the device.

Shapes: B batch (sequences of a micro-batch), T time (sequence length).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from grist_data.batch import IGNORE, Batch, batch_of
from grist_data.side_stream import SideStream
from grist_data.stages import StagedOrder
from grist_data.steps import Step


class Supply:
    """Makes the micro-batches of a step.

    documents, ignore_next_document: as in `Batches`. most_tokens: of the largest block of rows that will be asked for.
    """

    def __init__(
        self,
        order: StagedOrder,
        device: torch.device,
        documents: bool,
        ignore_next_document: bool,
        most_tokens: int,
    ) -> None:
        self._order, self._rows, self._device = order, order.rows, device
        self._documents, self._ignore_next_document = documents, ignore_next_document
        self._side = SideStream(device, most_tokens, self._rows.dtype) if device.type == "cuda" else None
        self._buffer = np.empty(0 if self._side else most_tokens, self._rows.dtype)

    def batches(self, step: Step) -> tuple[list[Batch], Any]:
        """The micro-batches, and on CUDA the event after which they are there (`hand_over`)."""
        n, T = len(step.offsets), step.setting.sequence_length
        micro = step.setting.micro_batch_size or n
        shape = n, T + 1
        if self._side is None:
            rows = self._buffer[: shape[0] * shape[1]].reshape(shape)
            self._rows.gather(step.offsets, rows)
            return [self._on_cpu(step, rows, at, at + micro) for at in range(0, n, micro)], None
        with self._side.sending(shape) as (buffer, send):
            self._rows.gather(step.offsets, buffer)
            rows_on_device = send()
            batches = [self._on_cuda(step, rows_on_device, at, at + micro) for at in range(0, n, micro)]
            return batches, self._side.ready()

    def hand_over(self, batches: list[Batch], ready: Any) -> list[Batch]:
        """Let the stream that is current here, the consumer's, wait until the batches are there."""
        if self._side is not None:
            self._side.hand_over([tensor for batch in batches for tensor in batch.tensors()], ready)
        return batches

    def _on_cpu(self, step: Step, rows: np.ndarray, begin: int, end: int) -> Batch:
        """The micro-batch of the rows [begin, end) of a step, for MPS too: it has no 16-bit unsigned integers."""
        T = step.setting.sequence_length
        # numpy widens 1.5 times as fast as torch. One block, but no tensor is a view of another, so that what a consumer
        # writes into the targets is not counted as a change of the ids by autograd.
        pair = np.empty((2, end - begin, T), np.int64)
        ids, targets = pair
        ids[:] = rows[begin:end, :-1]
        targets[:] = rows[begin:end, 1:]
        borders, ignored = self._borders_and_ignored(step, begin, end)
        n_valid = targets.size
        if ignored is not None:
            targets.reshape(-1)[ignored] = IGNORE
            n_valid -= _count(ignored)
        ids_BT, targets_BT = torch.from_numpy(ids), torch.from_numpy(targets)
        if self._device.type != "cpu":  # `to` costs a microsecond even where it does nothing
            ids_BT, targets_BT = ids_BT.to(self._device), targets_BT.to(self._device)
        return batch_of(ids_BT, targets_BT, borders, n_valid)

    def _on_cuda(self, step: Step, rows: torch.Tensor, begin: int, end: int) -> Batch:
        ids_BT = rows[begin:end, :-1].to(torch.int64)
        targets_BT = rows[begin:end, 1:].to(torch.int64)
        borders, ignored = self._borders_and_ignored(step, begin, end)
        n_valid = targets_BT.numel()
        if ignored is not None:
            on_device = torch.from_numpy(ignored).to(rows.device)
            if ignored.dtype == bool:
                targets_BT.view(-1).masked_fill_(on_device, IGNORE)
            else:
                targets_BT.view(-1).index_fill_(0, on_device, IGNORE)
            n_valid -= _count(ignored)
        return batch_of(ids_BT, targets_BT, borders, n_valid)

    def _borders_and_ignored(self, step: Step, begin: int, end: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Where documents end, flat numbers, None when not asked for; and the targets that do not count.

        These are flat numbers, each once; under a loss mask, where they are many, a flat array of bool; None for none.
        """
        T = step.setting.sequence_length
        borders, parts = None, []
        if self._order.masked:
            for row, position in enumerate(step.positions[begin:end].tolist()):
                if targets := self._order.masked.get(position):
                    parts.append(row * T + np.arange(targets))
        if self._documents or self._ignore_next_document:
            borders, last = self._rows.documents(step.offsets[begin:end], T, range(end - begin))
            if self._ignore_next_document:
                parts.append(last)
        if self._rows.has_loss_mask:
            untrained_BT = np.empty((end - begin, T), bool)
            self._rows.untrained(step.offsets[begin:end], untrained_BT)
            ignored = untrained_BT.reshape(-1)
            for part in parts:
                ignored[part] = True
            return borders if self._documents else None, ignored
        ignored = parts[0] if len(parts) == 1 else np.unique(np.concatenate(parts)) if parts else None
        return borders if self._documents else None, ignored


def _count(ignored: np.ndarray) -> int:
    return int(np.count_nonzero(ignored)) if ignored.dtype == bool else len(ignored)
