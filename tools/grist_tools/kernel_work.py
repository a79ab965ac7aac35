"""How much an op has to do at least: bytes that must move and operations that must be made. Needs only torch.

Shape letters: B batch, T time, D model width, N query heads, H head width, E experts, A active experts, F expert width,
R rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grist_kernels.quantized import PackedWeight


class Work(NamedTuple):
    """Of the forward, of the backward alone, and of both together. A backward of nothing is zero."""

    forward_bytes: float
    forward_flops: float
    backward_bytes: float
    backward_flops: float

    @property
    def both_bytes(self) -> float:
        return self.forward_bytes + self.backward_bytes

    @property
    def both_flops(self) -> float:
        return self.forward_flops + self.backward_flops


# FLOPs of the backward over those of the forward: two products for each one of the forward; attention makes five for two.
BACKWARD = {"attention": 2.5}


def work(op: str, arguments: dict[str, Any], gradients: tuple[str, ...], outputs: list[Tensor]) -> Work:
    """Bytes: what a direction needs is read once and what it makes is written once. FLOPs: the matrix products.

    A backward needs the inputs and the gradients of the outputs, unless the op says otherwise below, and makes one gradient
    for each name in gradients. Causal attention counts the pairs of query and key that see each other, as its papers do.
    """
    read, written = _bytes(_tensors(arguments)), _bytes(outputs)
    if op == "decode_attention":
        read = _bytes([arguments["q"]]) + _visible_cache_bytes(arguments)
    elif op in ("moe", "moe_mxfp4"):
        read = _chosen_experts_bytes(arguments)
    elif op == "rope":
        read = _bytes([arguments["q"], arguments["k"]]) + _rope_table_bytes(arguments)
    flops = _FLOPS[op](arguments) if op in _FLOPS else 0.0
    if not gradients:
        return Work(read + written, flops, 0.0, 0.0)
    if op in _BACKWARD_BYTES:
        backward_bytes = _BACKWARD_BYTES[op](arguments)
    else:
        backward_bytes = read + written + _bytes([arguments[name] for name in gradients])
    return Work(read + written, flops, backward_bytes, flops * BACKWARD.get(op, 2.0))


def _tensors(arguments: dict[str, Any]) -> list[Tensor]:
    packed = [
        part for value in arguments.values() if isinstance(value, PackedWeight) for part in value.tensors.values()
    ]
    return [*packed, *(value for value in arguments.values() if isinstance(value, Tensor))]


def _rms_norm_backward_bytes(arguments: dict[str, Any]) -> float:
    """Reads x (with a residual their sum, and the gradient of that sum), dy and weight; writes dx and dweight.

    x and residual have one gradient in common, which is written once.
    """
    rows = 3 if arguments.get("residual") is None else 4
    return rows * _bytes([arguments["x"]]) + 2 * _bytes([arguments["weight"]])


def _rope_backward_bytes(arguments: dict[str, Any]) -> float:
    """A rotation back: of q and k it needs nothing."""
    return 2 * _bytes([arguments["q"], arguments["k"]]) + _rope_table_bytes(arguments)


def _rope_table_bytes(arguments: dict[str, Any]) -> float:
    """cos and sin, or with positions the positions and as many rows as they can ask for."""
    tables, positions = _bytes([arguments["cos"], arguments["sin"]]), arguments.get("positions")
    if positions is None:
        return tables
    return tables * min(1.0, positions.numel() / arguments["cos"].shape[0]) + _bytes([positions])


def _attention_backward_bytes(arguments: dict[str, Any]) -> float:
    """Flash attention's: reads q, k, v, out, lse, d_out and sinks, and writes dq, dk, dv and d_sinks."""
    q, sinks = arguments["q"], arguments.get("sinks")
    inputs = [q, arguments["k"], arguments["v"], *([] if sinks is None else [sinks])]
    lse = 4.0 * q.shape[:-1].numel()
    return 2 * _bytes(inputs) + 2 * _bytes([q]) + lse


_BACKWARD_BYTES = {
    "rms_norm": _rms_norm_backward_bytes,
    "rope": _rope_backward_bytes,
    "attention": _attention_backward_bytes,
}


def _bytes(tensors: list[Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _attention(arguments: dict[str, Any]) -> float:
    q, cu_seqlens, window = arguments["q"], arguments.get("cu_seqlens"), arguments.get("window")
    N, H = q.shape[-2:]
    if cu_seqlens is None:
        pairs = q.shape[0] * visible_pairs(q.shape[1], q.shape[1], window)
    else:
        pairs = sum(visible_pairs(length, length, window) for length in cu_seqlens.diff().tolist())
    return 4.0 * pairs * N * H


def _decode_attention(arguments: dict[str, Any]) -> float:
    _, T, N, H = arguments["q"].shape
    lengths = arguments["lengths"].tolist()
    return 4.0 * N * H * sum(visible_pairs(T, length, arguments.get("window")) for length in lengths)


def visible_pairs(queries: int, keys: int, window: int | None) -> int:
    """Pairs in which one of the last `queries` of `keys` positions sees a position up to itself, within the window."""
    seen = torch.arange(keys - queries + 1, keys + 1).clamp(min=0)
    return int((seen if window is None else seen.clamp(max=window)).sum())


def _visible_cache_bytes(arguments: dict[str, Any]) -> float:
    T, window, cache = arguments["q"].shape[1], arguments.get("window"), arguments["k_cache"]
    slots = sum(min(length, length if window is None else window + T - 1) for length in arguments["lengths"].tolist())
    return 2.0 * slots * cache.shape[-2] * cache.shape[-1] * cache.element_size()


def _grouped_matmul(arguments: dict[str, Any]) -> float:
    _, width_in, width_out = arguments["w"].shape
    return 2.0 * int(arguments["offsets"][-1]) * width_in * width_out


def _moe(arguments: dict[str, Any]) -> float:
    _, F, D = arguments["w_down"].shape
    return 6.0 * arguments["expert_ids"].numel() * D * F


def _moe_mxfp4(arguments: dict[str, Any]) -> float:
    return 3.0 * arguments["expert_ids"].numel() * arguments["x"].shape[1] * arguments["gate_up_blocks"].shape[1]


_OF_EXPERTS = (
    "w_gate_up",
    "w_down",
    "gate_up_blocks",
    "gate_up_scales",
    "down_blocks",
    "down_scales",
    "b_gate_up",
    "b_down",
)


def _chosen_experts_bytes(arguments: dict[str, Any]) -> float:
    """Everything but the weights of experts that no token chose."""
    weights = [arguments[name] for name in _OF_EXPERTS if arguments.get(name) is not None]
    idle = 1.0 - arguments["expert_ids"].unique().numel() / weights[0].shape[0]
    return _bytes(_tensors(arguments)) - idle * _bytes(weights)


def _linear_cross_entropy(arguments: dict[str, Any]) -> float:
    V, D = arguments["weight"].shape
    return 2.0 * arguments["targets"].numel() * V * D


def _quantized_linear(arguments: dict[str, Any]) -> float:
    return 2.0 * arguments["x"].numel() * arguments["weight"].shape[0]


_FLOPS = {
    "attention": _attention,
    "decode_attention": _decode_attention,
    "grouped_matmul": _grouped_matmul,
    "moe": _moe,
    "moe_mxfp4": _moe_mxfp4,
    "quantized_linear": _quantized_linear,
    "linear_cross_entropy": _linear_cross_entropy,
}
