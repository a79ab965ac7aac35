"""Memory for kernels under test: poisoned between guard zones, or far larger than the machine's.

What torch.empty returns inside a `Poison` mode is full of NaN (integers: a large value) and lies between guard zones of the
same; whoever writes there is found when the mode's buffers are checked. Above SPARSE_BYTES, memory is virtual: nothing is
filled, nothing is checked, and a page exists once it is written.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

SPARSE_BYTES = 2**30
GUARD_BYTES = 512  # as a GPU's allocator aligns, so that a tensor's first element is aligned as there
_NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python 3.10's mmap does not name

_EMPTIES = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)


class Overwritten(Exception):
    """Memory was written that nobody had the right to write: a guard zone, a gap of a strided view, or an input."""


def virtual_bytes(count: int) -> np.ndarray:
    """(count,) uint8 zeros that take no memory until they are written. `count` may be larger than the machine's memory."""
    area = mmap.mmap(-1, max(count, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    with suppress(OSError):  # a kernel without huge pages knows no such advice
        area.madvise(mmap.MADV_NOHUGEPAGE)  # one written element costs 4 KiB, not 2 MiB
    return np.frombuffer(area, np.uint8, count)


def zeros(count: int, dtype: type) -> np.ndarray:
    """(count,) zeros, virtual if many."""
    size = count * np.dtype(dtype).itemsize
    return virtual_bytes(size).view(dtype) if size > SPARSE_BYTES else np.zeros(count, dtype)


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements lie between a view's first and last one, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def sparse_strided(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros of this shape and these strides (in elements) over virtual memory, for strides beyond 2**31 elements."""
    return _tensor(virtual_bytes(extent(shape, strides) * dtype.itemsize), 0, shape, strides, dtype)


def _tensor(raw: np.ndarray, start: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor whose first element is at byte `start` of raw, a multiple of the element's size."""
    with _disable_current_modes():
        storage = torch.from_numpy(raw).untyped_storage()
        return torch.empty(0, dtype=dtype).set_(storage, start // dtype.itemsize, tuple(shape), tuple(strides))  # type: ignore[arg-type]


def _poison(dtype: torch.dtype) -> int:
    """The byte that, repeated, is NaN, or a large positive integer, or True."""
    if dtype == torch.bool:
        return 1
    return 0xFF if dtype.is_floating_point or dtype.is_complex else 0x7F


class Guarded:
    """A poisoned tensor between two guard zones."""

    def __init__(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, name: str) -> None:
        self.name = name
        self.poison = _poison(dtype)
        payload = -(-extent(shape, strides) * dtype.itemsize // GUARD_BYTES) * GUARD_BYTES
        whole = np.full(payload + 3 * GUARD_BYTES, self.poison, np.uint8)
        slack = -whole.ctypes.data % GUARD_BYTES
        self.raw = whole[slack : slack + payload + 2 * GUARD_BYTES]
        self.tensor = _tensor(self.raw, GUARD_BYTES, shape, strides, dtype)
        self.itemsize = dtype.itemsize
        self.before: bytes | None = None  # the contents of an input that must stay as it is

    def elements(self) -> np.ndarray:
        """The tensor's bytes in raw, as a view (*shape, itemsize)."""
        strides = [stride * self.itemsize for stride in self.tensor.stride()]
        view = np.lib.stride_tricks.as_strided
        return view(self.raw[GUARD_BYTES:], (*self.tensor.shape, self.itemsize), (*strides, 1))

    def check(self) -> None:
        """Raise Overwritten if anything but the tensor's own elements was written."""
        outside = self.raw != self.poison
        if self.before is not None and self.elements().tobytes() != self.before:
            raise Overwritten(f"{self.name}: the input was written")
        view = np.lib.stride_tricks.as_strided
        strides = [stride * self.itemsize for stride in self.tensor.stride()]
        view(outside[GUARD_BYTES:], (*self.tensor.shape, self.itemsize), (*strides, 1))[...] = False
        if outside.any():
            first = (int(np.flatnonzero(outside)[0]) - GUARD_BYTES) // self.itemsize
            raise Overwritten(
                f"{self.name}, shape {tuple(self.tensor.shape)}, strides {self.tensor.stride()}: {int(outside.sum())} bytes "
                f"outside of its elements were written; the first belongs to element {first} of its memory"
            )


class Poison(TorchDispatchMode):
    """While it is on, torch.empty and its relatives give guarded memory, and every new storage on the CPU is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.allocations = 0
        self.buffers: list[Guarded] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "gristmill":
            raise NotImplementedError(
                f"{func} hides its allocations from the sanitizer: call the op outside of torch.compile"
            )
        if func in _EMPTIES and _device(args, kwargs) == "cpu":
            made = self._empty(func(*args, **{**kwargs, "device": "meta", "pin_memory": False}))
        else:
            made = func(*args, **kwargs)
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        fresh = {_storage(leaf) for leaf in tree_leaves(made) if isinstance(leaf, Tensor)}
        self.allocations += len(fresh - known - {0})
        return made

    def _empty(self, like: Tensor) -> Tensor:
        """Poisoned memory of a meta tensor's shape, strides and type."""
        shape, strides, dtype = like.shape, like.stride(), like.dtype
        if extent(shape, strides) * dtype.itemsize > SPARSE_BYTES:
            return sparse_strided(shape, strides, dtype)
        return self._keep(Guarded(shape, strides, dtype, f"allocation {self.allocations}"))

    def _keep(self, buffer: Guarded) -> Tensor:
        self.buffers.append(buffer)
        return buffer.tensor

    def guarded(self, tensor: Tensor, name: str, writable: bool) -> Tensor:
        """A copy of the tensor with its strides, between guard zones; its gaps are poisoned."""
        with _disable_current_modes():
            buffer = Guarded(tensor.shape, tensor.stride(), tensor.dtype, name)
            # Along an expanded axis all elements are one: write it once.
            once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
            buffer.tensor[once].copy_(tensor.detach()[once])
            if not writable:
                buffer.before = buffer.elements().tobytes()
            return self._keep(buffer).requires_grad_(tensor.requires_grad)

    def check(self) -> None:
        for buffer in self.buffers:
            buffer.check()


def _device(args: Any, kwargs: Any) -> str:
    asked = kwargs.get("device")
    if asked is not None:
        return torch.device(asked).type
    return args[0].device.type if isinstance(args[0], Tensor) else "cpu"


def _storage(tensor: Tensor) -> int:
    return 0 if tensor.device.type == "meta" else tensor.untyped_storage().data_ptr()
