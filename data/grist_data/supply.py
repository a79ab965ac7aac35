"""Rows of tokens out of the mapped files onto the device, as small as they are on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from grist_data.joined import Joined
from grist_data.shards import Shards

RING = 4


class Supply:
    """Copies windows into reused buffers, pinned on CUDA, and onto the device.

    most_tokens: of the largest block of rows that will be asked for.
    """

    def __init__(self, shards: Shards | Joined, most_tokens: int, device: torch.device) -> None:
        self._shards, self._device, self._turn = shards, device, 0
        on_gpu = device.type == "cuda"
        dtype = torch.uint16 if shards.dtype.itemsize == 2 else torch.int32  # ids stay below 2^31
        self._buffers = [torch.empty(most_tokens, dtype=dtype, pin_memory=on_gpu) for _ in range(RING if on_gpu else 1)]
        self._copied: list[Any] = [torch.cuda.Event() for _ in self._buffers] if on_gpu else []

    def rows(self, offsets: np.ndarray, width: int) -> torch.Tensor:
        """(len(offsets), width) tokens on the device (for MPS on the CPU); valid until the ring comes round."""
        k = self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[k][: len(offsets) * width].view(len(offsets), width)
        if self._copied:
            self._copied[k].synchronize()  # the copy out of this buffer, four steps ago
        self._shards.gather(offsets, buffer.numpy().view(self._shards.dtype))
        if not self._copied:
            return buffer
        on_device = buffer.to(self._device, non_blocking=True)
        self._copied[k].record()
        return on_device
