"""Products of activations and a weight on a CPU without gradients: as F.linear, by the fastest way there is.

D the width rows come in, O the width they leave in.

- Up to NATIVE_ROWS rows, a step of generation: the native kernel, where it could be compiled. float32 and bfloat16. The
  others are for float32.
- A few rows without it: F.linear multiplies them in one thread, as a vector times a matrix. A product of the weight
  with two or more columns is MKL's fast kind, and runs in all threads. So y^T = W x^T, with a single row doubled: the bytes of
  W decide, not the second column. 512 to 8192 outputs of 512 inputs, float32, AMD EPYC: F.linear reads 10 GB/s of
  weights, this 11 to 16 with one thread and 22 to 30 with two, for 1 to 3 rows; at 32 rows it is still 1.3 times as fast. With
  1408 inputs both read 13.
- Many rows, a prompt: oneDNN, which takes a tenth less time than MKL on that machine. A shape that is new to it costs a
  millisecond or two.

Nothing is packed or copied: weights may change between two calls. Sums go in another order than F.linear's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from grist_kernels import backend
from grist_kernels.native import linear as native

NATIVE_ROWS = 8
FEW_ROWS = 32
MANY_ROWS = 128
SMALLEST_WEIGHT = 2**16  # elements: below, the extra calls cost more than the product saves


def _onednn_product() -> Callable[..., Tensor] | None:
    """oneDNN's product of float32 activations and a plain weight: what torch.compile calls on a CPU.

    It is no public name, is there from torch 2.11 to 2.13, and has no gradient. None where this torch lacks it.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    return torch.ops.mkldnn._linear_pointwise.default


_has_mkl = torch.backends.mkl.is_available()  # other libraries were not measured
_onednn = _onednn_product()


def eager_float32(x: Tensor) -> bool:
    """Eager float32 on a CPU without gradients, and nobody asked for the reference, for Triton or for autocast."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and backend.mode() == "auto"
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D), weight (O, D), bias (O,) -> (..., O), as F.linear."""
    if weight.numel() < SMALLEST_WEIGHT or x.numel() == 0:
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    if rows <= NATIVE_ROWS and native.fits(x, weight, bias):
        return native.linear(x, weight, bias)
    if not eager_float32(x):
        return F.linear(x, weight, bias)
    if rows <= FEW_ROWS and _has_mkl:
        return _few_rows(x, weight, bias)
    if rows >= MANY_ROWS and _onednn is not None and weight.is_contiguous():
        return _onednn(x.contiguous(), weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x_RD = x.reshape(-1, x.shape[-1])
    # A copy, not expand: MKL takes a stride of zero to a single thread.
    doubled = torch.cat((x_RD, x_RD)) if x_RD.shape[0] == 1 else x_RD
    out_OR = F.linear(weight, doubled) if bias is None else torch.addmm(bias.unsqueeze(1), weight, doubled.t())
    return out_OR[:, : x_RD.shape[0]].t().contiguous().view(*x.shape[:-1], weight.shape[0])
