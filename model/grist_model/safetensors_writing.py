"""A safetensors file that is written a tensor, or some rows of one, at a time: its header first, then the data in any order.

Layout: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from grist_model.safetensors_file import TYPES

_NAMES = {dtype: name for name, dtype in TYPES.items()}
_ALIGNMENT = 8  # of the data, as the format asks of its header


class SafetensorsWriter:
    """Every tensor that was announced must be written once, whole, before the block ends.

    planned: name -> (type, shape) of every tensor.
    """

    def __init__(self, path: Path, planned: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        self.path = path
        self._planned = dict(planned)
        # Wide types first, so that every tensor is aligned to its type, whatever sizes came before it.
        order = sorted(planned, key=lambda name: -planned[name][0].itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
        self._starts, end = {}, 0
        for name in order:
            dtype, shape = planned[name]
            self._starts[name], begin = end, end
            end += torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._data = 8 + len(text)
        self._unwritten = {name: torch.Size(shape).numel() for name, (_, shape) in planned.items()}
        self._file = path.open("wb", buffering=0)
        self._put(len(text).to_bytes(8, "little") + text, 0)
        self._file.truncate(self._data + end)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                missing = [name for name, left in self._unwritten.items() if left]
                if missing:
                    raise ValueError(f"{self.path}: {', '.join(missing)} was announced but not written whole")
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """A tensor, or those of its rows that begin at `row`.

        Raises ValueError for another type or shape than was announced.
        """
        dtype, shape = self._planned[name]
        fits = tensor.dtype == dtype and tuple(tensor.shape[1:]) == tuple(shape[1:])
        fits = fits and tensor.dim() == len(shape) and (not shape or row + tensor.shape[0] <= shape[0])
        if not fits:
            raise ValueError(
                f"{name} was announced as {dtype} {tuple(shape)}, but is {tensor.dtype} {tuple(tensor.shape)} at row {row}"
            )
        self._unwritten[name] -= tensor.numel()
        at = self._starts[name] + row * torch.Size(shape[1:]).numel() * dtype.itemsize
        contiguous = tensor.detach().to("cpu").contiguous()
        self._put(contiguous.reshape(-1).view(torch.uint8).numpy().data, self._data + at)

    def _put(self, content: bytes | memoryview, at: int) -> None:
        self._file.seek(at)
        left = memoryview(content)
        while left:
            left = left[self._file.write(left) :]  # at most 2 GiB at a time on Linux
