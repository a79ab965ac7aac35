"""Triton's interpreter (TRITON_INTERPRET=1), made to compute what a GPU computes, and to refuse what a GPU leaves undefined.

`install()` repairs Triton 3.6 and 3.7 for the rest of the process: bfloat16 (interpreter_bfloat16), loops up to a runtime bound
under numpy 2.4, scalar arguments of their true types, and loop counters that are int32 as in a compiled kernel. A masked load
without `other=` and integer arithmetic that leaves its type are errors. Tensors are used where they lie, never copied.
"""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, Protocol

import interpreter_bfloat16
import interpreter_speed
import numpy as np
import triton.language as tl
from triton import knobs
from triton._C.libtriton import interpreter as memory  # type: ignore[import-not-found]
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    ASTTransformer,
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
)
from triton.runtime.jit import mangle_type

Program = tuple[int, int, int]
# Launch options that are no kernel parameter; any other unknown name is a mistake that compiled Triton refuses too.
OPTIONS = (
    "num_warps num_stages num_ctas maxnreg waves_per_eu matrix_instr_nonkdim kpack debug sanitize_overflow".split()
)


class Fault(Exception):
    """Something that the interpreter lets pass and a GPU does not promise."""


class MaskedLoadWithoutOther(Fault):
    """Lanes that are masked off hold nothing in particular unless `other=` says what."""


class IntegerOverflow(Fault):
    """Integer arithmetic left its type, mostly an offset that needed 64 bits."""


class Watcher(Protocol):
    """What sees a launch while it runs (interpreter_sanitizer)."""

    def begin(self, kernel: str, arguments: dict[str, Any], grid: Program) -> Iterable[Program]:
        """A launch starts; which of its programs to run, in which order."""
        ...

    def address(self, tensor: Any) -> int:
        """The address to give a kernel for a tensor argument."""
        ...

    def start(self, program: Program) -> None: ...
    def load(self, pointers: TensorHandle, mask: np.ndarray | None) -> np.ndarray:
        """Check a load and return the true addresses."""
        ...

    def store(self, pointers: TensorHandle, value: np.ndarray, mask: np.ndarray | None) -> None:
        """Check and do a store."""
        ...

    def end(self) -> None: ...


watcher: Watcher | None = None
_installed = False


def install() -> None:
    """Repair the interpreter. Calling it again does nothing.

    Raises RuntimeError where kernels would be compiled: TRITON_INTERPRET=1 must be set before triton is imported.
    """
    global _installed
    if not knobs.runtime.interpret:
        raise RuntimeError("interpreter_shim needs TRITON_INTERPRET=1 before triton is imported, but it is not set")
    if _installed:
        return
    interpreter_speed.speed_up()
    interpreter_bfloat16.repair()
    builder: Any = InterpreterBuilder
    builder.create_load = lambda self, pointers, *_: _load(pointers, None, None)
    builder.create_masked_load = _masked_load
    builder.create_store = lambda self, pointers, value, *_: _store(pointers, value, None)
    builder.create_masked_store = lambda self, pointers, value, mask, *_: _store(pointers, value, _array(mask))
    # tl.maximum and tl.minimum return the other operand for a NaN, unless asked to propagate it.
    builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    _semantic_checks()
    executor: Any = GridExecutor
    executor.__call__ = _launch
    function: Any = InterpretedFunction
    function.__call__ = lambda self, *arguments, **constants: self.rewrite()(*arguments, **constants)
    shared: Any = interpreter
    shared._implicit_cvt = _argument(shared._implicit_cvt)
    _patch_language()
    _installed = True


def _patch_language() -> None:
    """Put the interpreter's functions in place for good: doing so at every launch and every call of a device function, as the
    interpreter does, takes longer than a small kernel."""
    shared: Any = interpreter
    shared._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    language: Any = tl
    for module in (language, language.core):
        module.range = counted_range
    language.tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
    # The rewriter copies the interpreter's globals beside the kernel, where its rewritten loops find this name.
    shared.counted_range = counted_range
    transformer: Any = ASTTransformer
    transformer.visit_For = _visit_for


def _visit_for(self: ast.NodeTransformer, node: ast.For) -> ast.For:
    """Python's range in a kernel counts in int32 too."""
    self.generic_visit(node)
    if isinstance(node.iter, ast.Call) and isinstance(node.iter.func, ast.Name) and node.iter.func.id == "range":
        node.iter.func.id = "counted_range"
    return node


def counted_range(first: Any, last: Any = None, step: Any = 1, **_: Any) -> Iterator[Any]:
    """tl.range with counters of the type that they have on a GPU, so that arithmetic on them can overflow as it does there."""
    bounds = [0, first] if last is None else [first, last]
    bounds.append(1 if step is None else step)
    wide = any(isinstance(bound, tl.tensor) and bound.dtype.int_bitwidth == 64 for bound in bounds)
    start, stop, stride = (operator.index(bound) for bound in bounds)
    wide = wide or max(abs(start), abs(stop)) >= 2**31
    for count in range(start, stop, stride):
        yield _scalar(count, tl.int64 if wide else tl.int32)


def _scalar(value: Any, dtype: Any) -> Any:
    shared: Any = interpreter
    return tl.core.tensor(TensorHandle(np.array([value], shared._get_np_dtype(dtype)), dtype), dtype)


def _argument(original: Any) -> Any:
    """Arguments as a GPU gets them: Python floats as float32, integers of the type that their value asks for."""

    shared: Any = interpreter

    def convert(value: Any) -> Any:
        if isinstance(value, (bool, int, float)):
            return _scalar(value, tl.str_to_ty(mangle_type(value), None))
        converted = original(value)
        if watcher is not None and hasattr(value, "data_ptr"):
            converted.handle.data = np.array([watcher.address(shared._unwrap_tensor(value))], np.uint64)
        return converted

    return convert


def _launch(self: Any, *arguments: Any, **constants: Any) -> None:
    """GridExecutor.__call__ without its copies of whole storages; errors come out as they were raised."""
    parameters = inspect.getfullargspec(self.fn).args
    unknown = [name for name in constants if name not in parameters and name not in OPTIONS]
    if unknown:
        raise TypeError(f"{self.fn.__name__} has no parameter {unknown[0]!r}; it has {', '.join(parameters)}")
    constants = {name: value for name, value in constants.items() if name in parameters}
    for hook in self.pre_run_hooks:
        hook(*arguments, **constants)
    bound = inspect.getcallargs(self.fn, *arguments, **constants)
    grid: Any = self.grid(bound) if callable(self.grid) else self.grid
    x, y, z = (*grid, *(1,) * (3 - len(grid)))
    programs: Iterable[Program] = ((i, j, k) for k in range(z) for j in range(y) for i in range(x))
    if watcher is not None:
        given = {name: value for name, value in bound.items() if name not in self.constexprs}
        programs = watcher.begin(self.fn.__name__, given, (x, y, z))
    shared: Any = interpreter
    named = {name: value if name in self.constexprs else shared._implicit_cvt(value) for name, value in bound.items()}
    interpreter.interpreter_builder.set_grid_dim(x, y, z)
    with np.errstate(all="ignore"):
        for program in programs:
            interpreter.interpreter_builder.set_grid_idx(*program)
            if watcher is not None:
                watcher.start(program)
            self.fn(**named)
    if watcher is not None:
        watcher.end()


def _array(mask: Any) -> np.ndarray:
    """Block pointers and descriptors hand over a bare array."""
    return mask.data if isinstance(mask, TensorHandle) else mask


def _masked_load(
    self: Any, pointers: TensorHandle, mask: Any, other: TensorHandle | None, *_: Any, **__: Any
) -> TensorHandle:
    if other is None and isinstance(mask, np.ndarray) and not mask.all():
        raise MaskedLoadWithoutOther("block pointer load beyond its shape without padding_option=")
    return _load(pointers, _array(mask), other)


def _load(pointers: TensorHandle, mask: np.ndarray | None, other: TensorHandle | None) -> TensorHandle:
    shared: Any = interpreter
    element = pointers.get_element_ty()
    dtype = shared._get_np_dtype(element)
    addresses = pointers.data if watcher is None else watcher.load(pointers, mask)
    active = np.ones(addresses.shape, bool) if mask is None else mask
    rest = np.zeros(addresses.shape, dtype) if other is None else other.data
    return TensorHandle(memory.load(addresses, active, rest, dtype), element)


def _store(pointers: TensorHandle, value: TensorHandle, mask: np.ndarray | None) -> None:
    shared: Any = interpreter
    size = shared._get_np_dtype(pointers.get_element_ty()).itemsize
    if value.data.itemsize != size:
        raise TypeError(
            f"the interpreter holds {value.dtype} as {value.data.dtype}, but stores elements of {size} bytes"
        )
    if watcher is not None:
        watcher.store(pointers, value.data, mask)
        return
    memory.store(pointers.data, value.data, np.ones(pointers.data.shape, bool) if mask is None else mask)


def _semantic_checks() -> None:
    semantic: Any = TritonSemantic
    load = semantic._load_legacy

    def checked_load(self: Any, pointer: Any, mask: Any, other: Any, *rest: Any) -> Any:
        # Asked here and not in the builder, which is not given an `other` that is a scalar zero.
        if mask is not None and other is None:
            raise MaskedLoadWithoutOther("masked load without other=: the lanes that are masked off would be undefined")
        return load(self, pointer, mask, other, *rest)

    semantic._load_legacy = checked_load
    semantic.binary_op_sanitize_overflow_impl = _check_overflow


def _check_overflow(self: Any, left: Any, right: Any, operation: Any) -> None:
    """Triton's own overflow check (its debug mode) without its five temporaries."""
    dtype = left.type.scalar
    if dtype.int_bitwidth >= 64:
        return
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    result = function(left.handle.data, right.handle.data, dtype=np.int64)
    low, high = int(result.min()), int(result.max())
    if low < dtype.get_int_min_value() or high > dtype.get_int_max_value():
        worst = low if low < dtype.get_int_min_value() else high
        raise IntegerOverflow(
            f"program {interpreter.interpreter_builder.grid_idx}: {dtype} {operation.__name__} gives {worst}, "
            f"beyond {dtype}; compute it in int64 (or with sanitize_overflow=False, where wrapping is meant)"
        )
