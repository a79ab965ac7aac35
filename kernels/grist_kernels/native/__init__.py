"""Kernels in C for the few rows of a step of generation on a CPU, compiled at first need.

    GRIST_NATIVE=auto      used where there is a C compiler, or a library that it once made. Otherwise PyTorch runs, and a
                           line of the log says why (default)
    GRIST_NATIVE=0         never
    GRIST_NATIVE=require   a RuntimeError where it cannot be compiled

They serve mode "auto" alone (backend.py), eagerly and without gradients; "reference" and "triton" never come here. They take
float32 and bfloat16, and compute in float32.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from grist_kernels import backend
from grist_kernels.native import build

VARIABLE = "GRIST_NATIVE"
SETTINGS = ("auto", "0", "require")
KINDS = {torch.float32: 0, torch.bfloat16: 1}  # `enum Kind` of weights.h
FUNCTIONS = (
    "grist_linear", "grist_moe", "grist_decode_attention", "grist_rms_norm", "grist_attention_step", "grist_mlp",
    "grist_router",
)  # fmt: skip
_PLAIN = (Tensor, torch.nn.Parameter)  # no subclass that lies elsewhere, is sharded, or is not there at all

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_tried = False
_library: ctypes.CDLL | None = None


def _checked(setting: str, what: str) -> str:
    if setting not in SETTINGS:
        raise ValueError(f"{what} must be one of auto, 0 or require, but is {setting!r}")
    return setting


_setting = _checked(os.environ.get(VARIABLE, "auto"), f"the environment variable {VARIABLE}")


@contextmanager
def using(new_setting: str) -> Iterator[None]:
    """Run a block under another setting than the environment's (tests, benchmarks). Not thread-safe."""
    global _setting
    before, _setting = _setting, _checked(new_setting, "setting")
    try:
        yield
    finally:
        _setting = before


def available() -> bool:
    """Whether the library is there; compiles it at the first call. Raises RuntimeError if it is required and cannot be made."""
    return library() is not None


def library() -> ctypes.CDLL | None:
    """The library, or None where it is switched off or cannot be made. Raises RuntimeError as `available` does."""
    if _setting == "0":
        return None
    if not _tried or (_library is None and _setting == "require"):
        with _lock:
            _find()
    return _library


def _find() -> None:
    global _library, _tried
    if _library is not None:  # another thread was here first
        return
    try:
        _library = _declared(build.load())
    except build.CannotBuild as error:
        if _setting == "require":
            raise RuntimeError(f"{VARIABLE}=require, but the native kernels cannot be made: {error}") from error
        if not _tried:
            _log.info("generation on the CPU runs in PyTorch, without the native kernels: %s", error)
    _tried = True


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    for name in FUNCTIONS:
        function = getattr(found, name)
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
    return found


def takes(x: Tensor) -> bool:
    """Eager float32 or bfloat16 on a CPU without gradients, nobody asked for another implementation, and there is a library."""
    return (
        type(x) in _PLAIN
        and x.dtype in KINDS
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and backend.mode() == "auto"
        and not torch.is_autocast_enabled("cpu")
        and available()
    )


def call(function: str, arguments: bytes) -> None:
    """Call a function of the library with its one argument, a struct. Raises MemoryError if it has no room for its buffers."""
    found = library()
    if found is None:
        raise RuntimeError(f"{function}: there is no native library; ask `native.takes` first")
    if getattr(found, function)(arguments):
        raise MemoryError(f"{function}: no memory for its buffers")


def holds(*weights: Tensor | None) -> bool:
    """Whether the library can read these: plain, of a type that it knows, with neighbouring columns."""
    for w in weights:  # noqa: SIM110  (a generator takes longer than what it asks)
        if w is not None and (type(w) not in _PLAIN or w.dtype not in KINDS or w.stride(-1) != 1):
            return False
    return True
