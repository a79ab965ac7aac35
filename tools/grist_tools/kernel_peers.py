"""What else computes an op's result: PyTorch as written, torch.compile, PyTorch's own fused ops, Liger-Kernel if installed.

A peer takes the op's arguments and gives its results. An op has a function here that says which peers can do a given call.
Needs only torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Arguments = dict[str, Any]
Peers = dict[str, Callable[..., Any]]


def peers(op, arguments: Arguments, *, compiled: bool) -> Peers:
    """Peers of one call by name; `eager` is the op's formula in the type of its inputs throughout."""
    found: Peers = {"eager": _at_input_dtype(op.reference)}
    if compiled:
        torch._dynamo.reset()  # every case is compiled for its own shapes
        found["compile"] = torch.compile(op.reference, dynamic=False)
    if op.name in _OWN:
        found |= _OWN[op.name](arguments)
    if op.name in _LIGER and _has_liger(arguments):
        found |= _LIGER[op.name](arguments)
    return found


def _at_input_dtype(reference: Callable[..., Any]) -> Callable[..., Any]:
    from grist_kernels.precision import at_input_dtype

    def eager(**arguments):
        with at_input_dtype():
            return reference(**arguments)

    return eager


def _has_liger(arguments: Arguments) -> bool:
    on_cuda = any(isinstance(value, Tensor) and value.is_cuda for value in arguments.values())
    return on_cuda and importlib.util.find_spec("liger_kernel") is not None


def _rms_norm(arguments: Arguments) -> Peers:
    def torch_rms_norm(x, weight, eps=1e-5, residual=None):
        if residual is None:
            return F.rms_norm(x, (x.shape[-1],), weight, eps)
        h = x + residual
        return F.rms_norm(h, (h.shape[-1],), weight, eps), h

    return {"F.rms_norm": torch_rms_norm}


def _attention(arguments: Arguments) -> Peers:
    options = ("sinks", "window", "cu_seqlens")
    if any(arguments.get(name) is not None for name in options) or arguments.get("return_lse"):
        return {}

    def sdpa(q, k, v, scale=None, **_):
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)

    return {"SDPA": sdpa}


def _grouped_matmul(arguments: Arguments) -> Peers:
    x, w, offsets = arguments["x"], arguments["w"], arguments["offsets"]
    # F.grouped_mm wants rows of 16 bytes, leaves rows of nobody unwritten, and takes no bias.
    aligned = all(width * x.element_size() % 16 == 0 for width in w.shape[1:])
    if not aligned or x.shape[0] == 0 or x.shape[0] != int(offsets[-1]) or arguments.get("bias") is not None:
        return {}
    return {"F.grouped_mm": lambda x, w, offsets: F.grouped_mm(x, w, offs=offsets)}


def _linear_cross_entropy(arguments: Arguments) -> Peers:
    if arguments.get("z_loss") or arguments.get("softcap"):
        return {}

    def linear_then_cross_entropy(hidden, weight, targets, **options):
        return F.cross_entropy(F.linear(hidden, weight).flatten(0, -2), targets.flatten(), **options)

    found: Peers = {} if arguments.get("reduction") == "none" else {"F.cross_entropy": linear_then_cross_entropy}
    if found and hasattr(F, "linear_cross_entropy"):  # torch 2.13

        def torch_linear_cross_entropy(hidden, weight, targets, ignore_index=-100, **options):
            return F.linear_cross_entropy(
                hidden.flatten(0, -2), weight, targets.flatten(), ignore_index=ignore_index, **options
            )

        found["F.linear_cross_entropy"] = torch_linear_cross_entropy
    return found


def _liger_rms_norm(arguments: Arguments) -> Peers:
    def liger(x, weight, eps=1e-5, residual=None):
        if residual is None:
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

            return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)
        from liger_kernel.ops.fused_add_rms_norm import (  # pyright: ignore[reportMissingImports]
            LigerFusedAddRMSNormFunction,
        )

        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)

    return {"Liger": liger}


def _liger_swiglu(arguments: Arguments) -> Peers:
    if arguments.get("interleaved") or arguments.get("alpha") or arguments.get("limit"):
        return {}

    def liger(gate_up):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]

        return LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1))

    return {"Liger": liger}


def _liger_linear_cross_entropy(arguments: Arguments) -> Peers:
    if arguments.get("reduction") == "none":
        return {}

    def liger(hidden, weight, targets, z_loss=0.0, **options):
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy,
        )

        return liger_fused_linear_cross_entropy(
            hidden.flatten(0, -2), weight, targets.flatten(), lse_square_scale=z_loss, **options
        )

    return {"Liger": liger}


_OWN = {
    "rms_norm": _rms_norm,
    "attention": _attention,
    "grouped_matmul": _grouped_matmul,
    "linear_cross_entropy": _linear_cross_entropy,
}
_LIGER = {
    "rms_norm": _liger_rms_norm,
    "swiglu": _liger_swiglu,
    "linear_cross_entropy": _liger_linear_cross_entropy,
}
