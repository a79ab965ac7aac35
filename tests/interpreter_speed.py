"""The interpreter's bookkeeping, done less often: half of a small kernel's time goes into describing types and shapes anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def speed_up() -> None:
    """Remember types and shapes. Called once, by interpreter_shim.install."""
    _remember_numpy_types()
    _remember_block_types()
    _broadcast_only_what_differs()
    _remember_shapes()


def _remember_numpy_types() -> None:
    shared: Any = interpreter
    original = shared._get_np_dtype
    known: dict[str, np.dtype] = {}

    def numpy_type(dtype: Any) -> np.dtype:
        found = known.get(dtype.name)
        if found is None:
            found = known[dtype.name] = original(dtype)
        return found

    shared._get_np_dtype = numpy_type


def _remember_block_types() -> None:
    block: Any = tl.block_type
    original = block.with_element_ty
    known: dict[tuple[str, str], Any] = {}

    def with_element_ty(self: Any, element: Any) -> Any:
        key = (self.name, element.name)
        if key not in known:
            known[key] = original(self, element)
        return known[key]

    block.with_element_ty = with_element_ty


def _broadcast_only_what_differs() -> None:
    semantic: Any = TritonSemantic
    original = semantic.broadcast_impl_value
    known: dict[tuple[str, tuple[int, ...]], Any] = {}

    def expanded(self: Any, value: Any, shape: tuple[int, ...]) -> Any:
        if tuple(value.type.shape.values) == shape:
            return value
        key = (value.dtype.name, shape)
        if key not in known:
            known[key] = tl.block_type(value.dtype, list(shape))
        return self.tensor(self.builder.create_broadcast(value.handle, shape), known[key])

    def broadcast_impl_value(self: Any, left: Any, right: Any) -> Any:
        if not left.type.is_block() and not right.type.is_block():
            return left, right
        if left.type.is_block() and right.type.is_block():
            pairs = list(zip(left.type.shape.values, right.type.shape.values, strict=False))
            if len(left.type.shape) == len(right.type.shape) and all(1 in pair or pair[0] == pair[1] for pair in pairs):
                shape = tuple(map(max, pairs))
                return expanded(self, left, shape), expanded(self, right, shape)
        return original(self, left, right)

    semantic.broadcast_impl_value = broadcast_impl_value


def _remember_shapes() -> None:
    """A tensor's shape and size belong to its type: make them once for each type object."""
    tensor: Any = tl.tensor
    original = tensor.__init__

    def __init__(self: Any, handle: Any, type: Any) -> None:
        known = type.__dict__.get("_described") if type.is_block() else None
        if known is None:
            original(self, handle, type)
            if type.is_block():
                type._described = (self.shape, self.numel)
            return
        self.handle, self.type, self.dtype = handle, type, type.element_ty
        self.shape, self.numel = known

    tensor.__init__ = __init__
