"""In which type a reference computes: float32 (float64 when the input is float64).

`at_input_dtype()` switches that off, so that the same formula shows the error that plain PyTorch makes in, say,
bfloat16 throughout. The tolerances of the tests and of the benchmark are measured against that error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_widen = True


def upcast(x: Tensor) -> Tensor:
    """x in the type that a reference computes in: float64 stays, every other type becomes float32."""
    if x.dtype == torch.float64 or not _widen:
        return x
    return x.float()


@contextmanager
def at_input_dtype() -> Iterator[None]:
    """Inside, references compute in the type of their inputs. For measuring errors only; not thread-safe."""
    global _widen
    before, _widen = _widen, False
    try:
        yield
    finally:
        _widen = before
