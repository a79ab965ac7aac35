"""Liger-Kernel's Triton kernels as peers, each called as its authors do. They need CUDA and `pip install liger-kernel`.

Written against liger-kernel 0.8. A later version that differs fails its check or raises, and the benchmark says so.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from grist_tools import kernel_peers_moe
from grist_tools.kernel_peers import Arguments, Peer, Peers


def peers(op: str, arguments: Arguments) -> Peers:
    """{"Liger": ...} where Liger-Kernel is installed and has the call, else nothing."""
    on_cuda = any(isinstance(value, Tensor) and value.is_cuda for value in arguments.values())
    if not on_cuda or importlib.util.find_spec("liger_kernel") is None or op not in _PEERS:
        return {}
    peer = _PEERS[op](arguments)
    return {} if peer is None else {"Liger": peer}


def _rms_norm(arguments: Arguments) -> Peer:
    def liger(x, weight, eps=1e-5, residual=None, offset=0.0):
        casting = "gemma" if offset else "llama"
        if residual is None:
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

            return LigerRMSNormFunction.apply(x, weight, eps, offset, casting, False)
        from liger_kernel.ops.fused_add_rms_norm import (  # pyright: ignore[reportMissingImports]
            LigerFusedAddRMSNormFunction,
        )

        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, offset, casting, False)

    return Peer(liger, "in_place=False")


def _rope(arguments: Arguments) -> Peer | None:
    if 2 * arguments["cos"].shape[-1] != arguments["q"].shape[-1]:
        return None  # it turns whole heads only
    packed = arguments["q"].dim() == 3

    def own_copies(arguments: Arguments) -> Arguments:
        q, k = (arguments[name].clone(memory_format=torch.contiguous_format) for name in ("q", "k"))
        cos, sin = (torch.cat((arguments[name], arguments[name]), -1) for name in ("cos", "sin"))
        if (positions := arguments.get("positions")) is not None:
            cos, sin = cos[positions], sin[positions]
        return {"q": q, "k": k, "cos": cos, "sin": sin}

    def liger(q, k, cos, sin):
        from liger_kernel.ops.rope import LigerRopeFunction  # pyright: ignore[reportMissingImports]

        q, k = (x.unsqueeze(0) if packed else x for x in (q, k))
        cos, sin = (x if x.dim() == 3 else x.unsqueeze(0) for x in (cos, sin))
        q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)[:2]
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        return (q.squeeze(0), k.squeeze(0)) if packed else (q, k)

    # What it turns is turned again at the next call: other numbers, normally distributed as before.
    return Peer(liger, "in place, on contiguous copies made before timing; tables as wide as a head", own_copies)


def _swiglu(arguments: Arguments) -> Peer | None:
    if arguments.get("interleaved") or arguments.get("alpha") or arguments.get("limit"):
        return None  # there is none of GPT-OSS's form

    def liger(gate_up, **_):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]

        return LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1))

    return Peer(liger, "takes gate and up as two tensors: copies halves of one, and joins their gradients")


def _linear_cross_entropy(arguments: Arguments) -> Peer | None:
    if arguments.get("reduction") == "none":
        return None

    def liger(hidden, weight, targets, z_loss=0.0, **options):
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy,
        )

        return liger_fused_linear_cross_entropy(
            hidden.flatten(0, -2), weight, targets.flatten(), lse_square_scale=z_loss, **options
        )

    return Peer(liger, "gradients are made in the forward; the weight's is summed over chunks in the weight's type")


_PEERS = {
    "rms_norm": _rms_norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "linear_cross_entropy": _linear_cross_entropy,
    "moe": kernel_peers_moe.liger,
}
