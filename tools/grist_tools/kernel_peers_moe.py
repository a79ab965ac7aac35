"""What else computes grouped products and a mixture of experts: F.grouped_mm with the rest around it, a loop over experts.

T tokens, D model width, E experts, A active experts per token, F expert width, R rows sorted by expert. Needs only torch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grist_tools.kernel_peers import Arguments, Peer, Peers, absent

# References that loop over all experts: torch.compile would unroll 128 of them, for minutes, into what nobody would run.
LOOPS = frozenset({"grouped_matmul", "moe", "moe_mxfp4"})


def grouped_matmul(arguments: Arguments) -> Peers:
    x, w, offsets = arguments["x"], arguments["w"], arguments["offsets"]
    # F.grouped_mm leaves rows of nobody unwritten.
    if not _aligned(x, *w.shape[1:]) or x.shape[0] == 0 or x.shape[0] != int(offsets[-1]):
        return {}
    note = "" if arguments.get("bias") is None else "the bias is added to its rows afterwards: it takes none"
    return {"F.grouped_mm": Peer(_grouped_mm, note)}


def moe(arguments: Arguments) -> Peers:
    _, D, wide = arguments["w_gate_up"].shape
    found: Peers = {"loop": Peer(_loop, "over the experts that have tokens, as transformers' eager experts")}
    if _aligned(arguments["x"], D, wide, wide // 2) and arguments["x"].shape[0] > 0:
        found["F.grouped_mm"] = Peer(
            _composed, "sort, gather, two F.grouped_mm, bias and SwiGLU in PyTorch, gather, sum"
        )
    return found


def moe_mxfp4(arguments: Arguments) -> Peers:
    """Our own layer on the same weights in x's type: what four bits save, and what decoding them costs."""
    from grist_kernels import moe as dense
    from grist_kernels.moe_mxfp4.dequantise import dequantise_mxfp4

    def dequantised(arguments: Arguments) -> Arguments:
        rest = {name: value for name, value in arguments.items() if not name.endswith(("_blocks", "_scales"))}
        for layer, name in (("gate_up", "w_gate_up"), ("down", "w_down")):
            w = dequantise_mxfp4(arguments[f"{layer}_blocks"], arguments[f"{layer}_scales"])
            rest[name] = w.transpose(1, 2).to(arguments["x"].dtype).contiguous()
        return rest

    return {"moe": Peer(dense, "our moe on dequantised weights, made before timing", dequantised, forward_only=True)}


def moe_compiled(arguments: Arguments) -> Peers:
    """The composition around F.grouped_mm under torch.compile, which fuses what lies between the products."""
    if "F.grouped_mm" not in moe(arguments):
        return {}
    if arguments["x"].dtype != torch.bfloat16:
        return {"F.grouped_mm compiled": absent("torch.compile traces F.grouped_mm in bfloat16 only")}
    return {
        "F.grouped_mm compiled": Peer(torch.compile(_composed, dynamic=False), "the composition under torch.compile")
    }


def _aligned(x: Tensor, *widths: int) -> bool:
    """F.grouped_mm wants rows of 16 bytes."""
    return all(width * x.element_size() % 16 == 0 for width in widths)


def _grouped_mm(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    # PyTorch before 2.13 takes only bfloat16 on CUDA, and no gradient whose strides are zero.
    y = F.grouped_mm(x, w, offs=offsets.int())
    if bias is None:
        return y
    rows = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype)
    return y + bias[torch.searchsorted(offsets, rows, right=True)]


def _swiglu(h: Tensor, alpha: float | None, limit: float | None, interleaved: bool) -> Tensor:
    gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up if alpha is None else gate * torch.sigmoid(alpha * gate) * (up + 1)


def _composed(
    x, expert_ids, expert_weights, w_gate_up, w_down, b_gate_up=None, b_down=None, alpha=None, limit=None,
    interleaved=False,
) -> Tensor:  # fmt: skip
    flat, A = expert_ids.flatten(), expert_ids.shape[1]
    order = flat.argsort(stable=True)
    experts = torch.arange(w_down.shape[0], device=x.device, dtype=flat.dtype)
    offsets = torch.searchsorted(flat[order], experts, right=True)
    act = _swiglu(_grouped_mm(x[order // A], w_gate_up, offsets, b_gate_up), alpha, limit, interleaved)
    y = _grouped_mm(act, w_down, offsets, b_down)[order.argsort()].view(*expert_ids.shape, -1)
    return (y * expert_weights.unsqueeze(-1)).sum(1).to(x.dtype)


def _loop(
    x, expert_ids, expert_weights, w_gate_up, w_down, b_gate_up=None, b_down=None, alpha=None, limit=None,
    interleaved=False,
) -> Tensor:  # fmt: skip
    out = torch.zeros_like(x)
    for e in expert_ids.unique().tolist():
        token, choice = (expert_ids == e).nonzero(as_tuple=True)
        h = x[token] @ w_gate_up[e]
        act = _swiglu(h if b_gate_up is None else h + b_gate_up[e], alpha, limit, interleaved)
        y = act @ w_down[e]
        y = y if b_down is None else y + b_down[e]
        out = out.index_add(0, token, (y * expert_weights[token, choice, None]).to(out.dtype))
    return out


def liger(arguments: dict[str, Any]) -> Peer | None:
    """Liger-Kernel's fused layer: no biases, the plain gate, weights the other way round."""
    if any(arguments.get(name) is not None for name in ("b_gate_up", "b_down", "alpha", "limit")):
        return None
    if arguments.get("interleaved"):
        return None

    def other_way_round(arguments: Arguments) -> Arguments:
        turned = {
            name: arguments[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("w_gate_up", "w_down")
        }
        return {**arguments, **turned, "expert_ids": arguments["expert_ids"].int()}

    def fused(x, expert_ids, expert_weights, w_gate_up, w_down, **_):
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

        return LigerFusedMoEFunction.apply(
            x, w_gate_up.transpose(1, 2), w_down.transpose(1, 2), expert_ids, expert_weights
        )

    return Peer(
        fused, "waits for the device; tunes itself before it is timed; weights laid out its own way", other_way_round
    )
