"""Which implementation runs: the only file that reads GRIST_KERNELS and the only one that decides.

    auto        CUDA: Triton where the op has a kernel that takes the call; otherwise, and on CPU and MPS, plain PyTorch.
                (default)
    triton      Triton for every op that has a kernel; a call that its kernel cannot take is an error. An op that nobody
                has written a kernel for runs in plain PyTorch, and says so once. Without a GPU this needs
                TRITON_INTERPRET=1.
    reference   every op runs its reference.py: float32 inside, the formula as written. The oracle.

Plain PyTorch means an op's `pytorch_fast.py` where it has one and it fits the call, else its `reference.py`. Both are exact:
no approximation hides behind `auto`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

VARIABLE = "GRIST_KERNELS"
MODES = ("auto", "triton", "reference")
_HERE = Path(__file__).parent

# An op is a folder; what it has is what it can run. Adding <op>/triton_kernel.py is all that a new kernel needs here.
OP_NAMES = tuple(sorted(path.parent.name for path in _HERE.glob("*/reference.py")))
TRITON_OPS = frozenset(path.parent.name for path in _HERE.glob("*/triton_kernel.py"))
PYTORCH_FAST_OPS = frozenset(path.parent.name for path in _HERE.glob("*/pytorch_fast.py"))
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton reads the variable once too, when it is imported.
INTERPRETING = TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"


def _checked(mode: str, what: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{what} must be one of auto, triton or reference, but is {mode!r}")
    return mode


_mode = _checked(os.environ.get(VARIABLE, "auto"), f"the environment variable {VARIABLE}")


def mode() -> str:
    """The mode in force: "auto", "triton" or "reference"."""
    return _mode


@contextmanager
def using(new_mode: str) -> Iterator[None]:
    """Run a block under another mode than the environment's (tests, benchmarks). Not thread-safe."""
    global _mode
    before, _mode = _mode, _checked(new_mode, "mode")
    try:
        yield
    finally:
        _mode = before


def implementation(op: str, device_type: str, cannot: str | None = None) -> str:
    """Which implementation op runs on a device ("cpu", "cuda", "mps"): "triton", "pytorch" or "reference".

    cannot says why the op's Triton kernel cannot take this call (a type, a size), if so. "pytorch" means: `pytorch_fast.py`
    for the calls it can express exactly, `reference.py` for the others.

    Raises RuntimeError if the mode is "triton" and the op's kernel cannot run here, or cannot take the call.
    """
    if _mode == "reference":
        return "reference"
    if op in TRITON_OPS:
        if _mode == "triton":
            _check_can_run(op, device_type, cannot)
            return "triton"
        if device_type == "cuda" and TRITON_INSTALLED and cannot is None:
            return "triton"
    elif _mode == "triton":
        _say_once(op)
    return "pytorch" if op in PYTORCH_FAST_OPS else "reference"


def cannot_take(op: str, *tensors: Tensor, limit: str | None = None) -> str | None:
    """Why a Triton kernel cannot take these tensors: the kernels compute in float32; `limit` is the op's own reason."""
    for tensor in tensors:
        if tensor.dtype not in TRITON_DTYPES:
            return f"{op}'s Triton kernel takes float32, bfloat16 and float16, but got {tensor.dtype}"
    return limit


def _check_can_run(op: str, device_type: str, cannot: str | None) -> None:
    remedy = f"Use {VARIABLE}=auto, which takes plain PyTorch here."
    if not TRITON_INSTALLED:
        raise RuntimeError(f"{VARIABLE}=triton, but triton is not installed. `pip install triton`, or: {remedy}")
    if device_type not in ("cuda", "meta") and not INTERPRETING:
        raise RuntimeError(
            f"{VARIABLE}=triton, but {op} was called on a {device_type} tensor and Triton needs a GPU. "
            f"Set TRITON_INTERPRET=1 to interpret the kernels on a CPU (slow, exact), or: {remedy}"
        )
    if cannot is not None:
        raise RuntimeError(f"{VARIABLE}=triton, but {cannot}. {remedy}")


_said: set[str] = set()


@torch.compiler.assume_constant_result  # a graph would break at a warning
def _say_once(op: str) -> None:
    if op in _said:
        return
    _said.add(op)
    have = ", ".join(sorted(TRITON_OPS))
    warnings.warn(
        f"{VARIABLE}=triton: {op} has no Triton kernel yet and runs in plain PyTorch (ops that have one: {have})",
        RuntimeWarning,
        stacklevel=3,
    )


def triton_kernel(op: str) -> ModuleType:
    """An op's triton_kernel.py, imported when first called: triton is needed only where it runs."""
    return sys.modules[_imported(f"grist_kernels.{op}.triton_kernel")]


@torch.compiler.assume_constant_result  # a graph would break at an import; a name is a constant that it can keep
def _imported(name: str) -> str:
    importlib.import_module(name)
    return name


def describe(device_type: str) -> dict[str, str]:
    """Op name -> implementation on a device, for a program to print when it starts.

    Raises RuntimeError if the mode is "triton" and Triton cannot run on that device."""
    return {op: implementation(op, device_type) for op in OP_NAMES}
