"""Copies to a CUDA device beside what it computes: a ring of pinned buffers and a stream of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

RING = 4


class SideStream:
    """Sends blocks of rows, as small as they are on disk, and runs on the device what is to be done with them first.

    Two orders hold it together: a buffer is written again only after its last copy is finished (an event that the host waits
    for), and what comes out is read only after it is complete (an event that the consumer's stream waits for; the host does
    not). Memory that came from this stream is given back to it: `record_stream` keeps it until the consumer's stream is done.

    most_tokens: of a block. dtype: of the files, uint16 or uint32.
    """

    def __init__(self, device: torch.device, most_tokens: int, dtype: np.dtype) -> None:
        # A thread begins on device 0, whatever is current where this is made.
        self.device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        self._stream = torch.cuda.Stream(self.device)
        self._dtype = dtype
        as_torch = torch.uint16 if dtype.itemsize == 2 else torch.int32  # ids stay below 2^31
        self._buffers = [_pinned(most_tokens, as_torch) for _ in range(RING)]
        self._copied = [torch.cuda.Event() for _ in range(RING)]
        self._turn = 0

    @contextlib.contextmanager
    def sending(self, shape: tuple[int, int]) -> Iterator[tuple[np.ndarray, Callable[[], torch.Tensor]]]:
        """A buffer to fill, and a function that sends it and gives the rows on the device; this stream is current inside."""
        k = self._turn = (self._turn + 1) % RING
        self._copied[k].synchronize()  # of the copy that left this buffer a whole ring ago
        buffer = self._buffers[k][: shape[0] * shape[1]].view(shape)

        def send() -> torch.Tensor:
            on_device = buffer.to(self.device, non_blocking=True)
            self._copied[k].record(self._stream)
            return on_device

        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield buffer.numpy().view(self._dtype), send

    def ready(self) -> Any:
        """An event after all that was begun on this stream."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def hand_over(self, tensors: Sequence[torch.Tensor], ready: Any) -> None:
        """Give tensors of this stream to the one that is current here."""
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_event(ready)
        for tensor in tensors:
            tensor.record_stream(consumer)


def _pinned(n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(n, dtype=dtype, pin_memory=True)
