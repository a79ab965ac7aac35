"""One safetensors file, read a tensor or some rows at a time into memory of their own.

The package's own reader maps the file: its pages count as this process's memory beside the tensors made from them, and a file
that shrinks while it is mapped ends the process. Layout: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
EVERYTHING = slice(None)


class Entry(NamedTuple):
    """Where a tensor lies: its type as the header spells it, its shape, and its first byte in the file."""

    type: str
    shape: tuple[int, ...]
    start: int


class SafetensorsFile:
    """entries: name -> Entry of every tensor.

    Raises ValueError for what is no safetensors file, or a damaged one: a header that is cut short or no JSON, tensors that
    overlap, leave holes or do not fill the file.
    """

    def __init__(self, path: Path):
        try:
            with safe_open(path, framework="pt"):
                pass  # checks the header against itself and against the size of the file
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or no safetensors file ({error}): copy or download it again, this one has "
                f"{path.stat().st_size} bytes"
            ) from error
        self.path = path
        self._file = path.open("rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(length))
        self.entries = {
            name: Entry(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def read(self, name: str, rows: slice = EVERYTHING) -> Tensor:
        """A tensor, or rows of its first axis, on the CPU in the type that is stored."""
        entry = self.entries[name]
        shape = entry.shape if rows == EVERYTHING else (len(range(*rows.indices(entry.shape[0]))), *entry.shape[1:])
        size = torch.Size(shape).numel() * TYPES[entry.type].itemsize
        # Pages of its own, which the system has back at once: freed by malloc, what is read on the way would leave holes
        # between the weights that stay, a third of a model's size.
        memory = mmap.mmap(-1, max(1, size))
        self._read_into(memoryview(memory)[:size], self._start(entry, rows))
        return torch.frombuffer(memory, dtype=torch.uint8)[:size].view(TYPES[entry.type]).view(shape)

    def read_into(self, name: str, rows: slice, out: Tensor) -> None:
        """The same into a contiguous tensor on the CPU, of the type that is stored and as many values."""
        assert out.is_contiguous()
        assert out.dtype == TYPES[self.entries[name].type]
        memory = out.detach().reshape(-1).view(torch.uint8).numpy().data
        self._read_into(memory, self._start(self.entries[name], rows))

    @staticmethod
    def _start(entry: Entry, rows: slice) -> int:
        if rows == EVERYTHING:
            return entry.start
        first = rows.indices(entry.shape[0])[0]
        return entry.start + first * torch.Size(entry.shape[1:]).numel() * TYPES[entry.type].itemsize

    def _read_into(self, memory: memoryview, start: int) -> None:
        self._file.seek(start)
        while memory:
            count = self._file.readinto(memory)  # at most 2 GiB at a time on Linux
            if not count:
                raise ValueError(f"{self.path} has become shorter while it was read: load it again once it is written")
            memory = memory[count:]
