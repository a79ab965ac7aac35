"""Which implementation runs: the only file that reads GRIST_KERNELS and the only one that decides.

    auto        CUDA: Triton where the op has a kernel; otherwise, and on CPU and MPS, plain PyTorch.   (default)
    triton      Triton everywhere; an op without a kernel is an error, never a silent fallback. Without a GPU this needs
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

VARIABLE = "GRIST_KERNELS"
MODES = ("auto", "triton", "reference")
_HERE = Path(__file__).parent

# An op is a folder; what it has is what it can run. Adding <op>/triton_kernel.py is all that a new kernel needs here.
OP_NAMES = tuple(sorted(path.parent.name for path in _HERE.glob("*/reference.py")))
TRITON_OPS = frozenset(path.parent.name for path in _HERE.glob("*/triton_kernel.py"))
PYTORCH_FAST_OPS = frozenset(path.parent.name for path in _HERE.glob("*/pytorch_fast.py"))
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


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


def implementation(op: str, device_type: str) -> str:
    """Which implementation op runs on a device ("cpu", "cuda", "mps"): "triton", "pytorch" or "reference".

    "pytorch" means: `pytorch_fast.py` for the calls it can express exactly, `reference.py` for the others.

    Raises RuntimeError if the mode is "triton" and the op has no Triton kernel.
    """
    if _mode == "reference":
        return "reference"
    if op in TRITON_OPS and (_mode == "triton" or (device_type == "cuda" and TRITON_INSTALLED)):
        return "triton"
    if _mode == "triton":
        have = ", ".join(sorted(TRITON_OPS)) or "none yet"
        raise RuntimeError(
            f"{VARIABLE}=triton, but {op} has no Triton kernel (ops that have one: {have}). "
            f"Use {VARIABLE}=auto to run the others in plain PyTorch."
        )
    return "pytorch" if op in PYTORCH_FAST_OPS else "reference"


def triton_kernel(op: str) -> ModuleType:
    """An op's triton_kernel.py, imported when first called: triton is needed only where it runs."""
    return sys.modules[_imported(f"grist_kernels.{op}.triton_kernel")]


@torch.compiler.assume_constant_result  # a graph would break at an import; a name is a constant that it can keep
def _imported(name: str) -> str:
    importlib.import_module(name)
    return name


def describe(device_type: str) -> dict[str, str]:
    """Op name -> implementation on a device, for a program to print when it starts. Under "triton", an op without a kernel
    is listed as "none" (calling it would raise)."""
    if _mode == "triton":
        return {op: "triton" if op in TRITON_OPS else "none" for op in OP_NAMES}
    return {op: implementation(op, device_type) for op in OP_NAMES}
