"""What else computes an op's result: PyTorch as written, PyTorch's own fused ops, torch.compile, Liger-Kernel if installed.

An op has a function here (attention's are in kernel_peers_attention.py, those of a mixture of experts in kernel_peers_moe.py,
Liger-Kernel's in kernel_peers_liger.py) that says which peers can do a given call.
Needs only torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A function of an op's arguments that gives the op's results.

    note says what a reader of its times has to know. prepare makes the arguments that this peer is called with, before
    anything is timed, where it needs others than the op's. forward_only: it has no gradients, or not all of them.
    absent says why it cannot run here, if so: then it is neither checked nor timed, and the reason stands in the row.
    """

    function: Callable[..., Any]
    note: str = ""
    prepare: Callable[[Arguments], Arguments] = dict
    forward_only: bool = False
    absent: str = ""


Peers = dict[str, Peer]


def absent(why: str) -> Peer:
    """A peer that could do the call, but cannot run here."""

    def missing(**_: Any) -> Any:
        raise RuntimeError(f"this peer cannot run here: {why}")

    return Peer(missing, absent=why)


def peers(op, arguments: Arguments, *, all_of_them: bool) -> Peers:
    """Peers of one call by name: PyTorch as written ("eager") and its own fused ops; with all_of_them also torch.compile
    (for attention FlexAttention too) and Liger-Kernel, where it is installed and can do the call."""
    found: Peers = {"eager": Peer(_at_input_dtype(op.reference), "the formula in the type of its inputs throughout")}
    from grist_tools import kernel_peers_attention, kernel_peers_liger, kernel_peers_moe

    own = _OWN | {
        "attention": kernel_peers_attention.attention,
        "decode_attention": kernel_peers_attention.decode_attention,
        "grouped_matmul": kernel_peers_moe.grouped_matmul,
        "moe": kernel_peers_moe.moe,
        "moe_mxfp4": kernel_peers_moe.moe_mxfp4,
    }
    if op.name in own:
        found |= own[op.name](arguments)
    if all_of_them:
        torch._dynamo.reset()  # every case is compiled for its own shapes
        if op.name not in kernel_peers_moe.LOOPS:
            compiled = torch.compile(op.reference, dynamic=False)
            found["compile"] = Peer(compiled, "torch.compile of the reference: float32 inside, as ours")
        if op.name in kernel_peers_attention.FLEX:
            found |= kernel_peers_attention.flex(op.name, arguments)
        if op.name == "moe":
            found |= kernel_peers_moe.moe_compiled(arguments)
        found |= kernel_peers_liger.peers(op.name, arguments)
    return found


def _at_input_dtype(reference: Callable[..., Any]) -> Callable[..., Any]:
    from grist_kernels.precision import at_input_dtype

    def eager(**arguments):
        with at_input_dtype():
            return reference(**arguments)

    return eager


def _rms_norm(arguments: Arguments) -> Peers:
    if arguments.get("offset"):
        return {}

    def torch_rms_norm(x, weight, eps=1e-5, residual=None, **_):
        weight = weight.to(x.dtype)  # of two types PyTorch makes a slower call, and a result in the wider one
        if residual is None:
            return F.rms_norm(x, (x.shape[-1],), weight, eps)
        h = x + residual
        return F.rms_norm(h, (h.shape[-1],), weight, eps), h

    return {"F.rms_norm": Peer(torch_rms_norm)}


def _swiglu(arguments: Arguments) -> Peers:
    if arguments.get("interleaved") or arguments.get("alpha") or arguments.get("limit"):
        return {}

    def silu_times_up(gate_up, **_):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    return {"F.silu": Peer(silu_times_up)}


def _linear_cross_entropy(arguments: Arguments) -> Peers:
    if arguments.get("z_loss") or arguments.get("softcap"):
        return {}

    def linear_then_cross_entropy(hidden, weight, targets, **options):
        return F.cross_entropy(F.linear(hidden, weight).flatten(0, -2), targets.flatten(), **options)

    found: Peers = {} if arguments.get("reduction") == "none" else {"F.cross_entropy": Peer(linear_then_cross_entropy)}
    if found and hasattr(F, "linear_cross_entropy"):  # torch 2.13

        def torch_linear_cross_entropy(hidden, weight, targets, ignore_index=-100, **options):
            return F.linear_cross_entropy(
                hidden.flatten(0, -2), weight, targets.flatten(), ignore_index=ignore_index, **options
            )

        found["F.linear_cross_entropy"] = Peer(torch_linear_cross_entropy)
    return found


_OWN = {
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "linear_cross_entropy": _linear_cross_entropy,
}
