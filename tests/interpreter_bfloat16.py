"""bfloat16 for Triton's interpreter, which keeps the type as uint16 and would otherwise add, compare and multiply those bits.

Every repaired operation widens to float32, computes, and rounds to nearest even, as a GPU does. What Triton itself widens
first (maximum, minimum, clamp, reductions to a maximum or minimum, cumsum) or moves as bits (where, join, abs) needs no
repair; functions such as exp refuse the type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

NAN = 0x7FFF  # what a GPU's conversion writes (PTX ISA, cvt)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) as float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits (uint16), rounded to nearest even; subnormals stay, overflow becomes infinite, NaN stays NaN."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), NAN, rounded).astype(np.uint16)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def repair() -> None:
    """Replace what the interpreter does wrong with bfloat16. Called once, by interpreter_shim.install."""
    builder: Any = InterpreterBuilder
    builder.binary_op = _binary(builder.binary_op)
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_dot = _dot(builder.create_dot)
    builder.create_fma = _fma(builder.create_fma)
    builder.get_bf16 = lambda self, value: TensorHandle(narrow(np.array([value])), tl.bfloat16)
    reductions: Any = ReduceOps
    reductions.sum = _sum(reductions.sum)


def _binary(original: Callable) -> Callable:
    def binary_op(self: Any, left: TensorHandle, right: TensorHandle, function: Callable) -> TensorHandle:
        if not _is_bfloat16(left):
            return original(self, left, right, function)
        result = function(widen(left.data), widen(right.data))
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return TensorHandle(narrow(result), tl.bfloat16)

    return binary_op


def _cast(original: Callable) -> Callable:
    def cast_impl(self: Any, source: TensorHandle, target_type: Any) -> TensorHandle:
        before, after = source.dtype.scalar, target_type.scalar
        if before == after:
            return original(self, source, target_type)
        if after == tl.bfloat16:
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return original(self, _widened(source), target_type)

    return cast_impl


def _dot(original: Callable) -> Callable:
    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return original(self, _widened(a), _widened(b), *rest)

    return create_dot


def _fma(original: Callable) -> Callable:
    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not _is_bfloat16(z):
            return original(self, x, y, z)
        return TensorHandle(narrow(widen(x.data) * widen(y.data) + widen(z.data)), tl.bfloat16)

    return create_fma


def _sum(original: Callable) -> Callable:
    def total(self: Any, values: Any) -> Any:
        if values.dtype.scalar != tl.bfloat16:
            return original(self, values)
        return self.to_tensor(narrow(original(self, _float32_tensor(values)).handle.data), tl.bfloat16)

    return total


def _float32_tensor(values: Any) -> Any:
    return tl.core.tensor(_widened(values.handle), tl.block_type(tl.float32, list(values.shape)))
