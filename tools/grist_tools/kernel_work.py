"""How much an op has to do at least: bytes that must move and operations that must be made. Needs only torch.

Shape letters: B batch, T time, D model width, N query heads, H head width, E experts, A active experts, F expert width,
R rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Work(NamedTuple):
    """Of the forward, and of forward and backward together."""

    forward_bytes: float
    forward_flops: float
    both_bytes: float
    both_flops: float


# FLOPs of the backward over those of the forward: two products for each one of the forward; attention makes five for two.
BACKWARD = {"attention": 2.5}


def work(op: str, arguments: dict[str, Any], gradients: tuple[str, ...], outputs: list[Tensor]) -> Work:
    """Bytes: every input read once and every result written once, in either direction. FLOPs: the matrix products.

    Causal attention counts the pairs of query and key that see each other, as its papers do.
    """
    inputs = [value for value in arguments.values() if isinstance(value, Tensor)]
    read, written = _bytes(inputs), _bytes(outputs)
    if op == "decode_attention":
        read = _bytes([arguments["q"]]) + _visible_cache_bytes(arguments)
    flops = _FLOPS[op](arguments) if op in _FLOPS else 0.0
    if not gradients:
        return Work(read + written, flops, read + written, flops)
    backward_bytes = read + written + _bytes([arguments[name] for name in gradients])
    return Work(read + written, flops, read + written + backward_bytes, flops * (1 + BACKWARD.get(op, 2.0)))


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


def _linear_cross_entropy(arguments: dict[str, Any]) -> float:
    V, D = arguments["weight"].shape
    return 2.0 * arguments["targets"].numel() * V * D


_FLOPS = {
    "attention": _attention,
    "decode_attention": _decode_attention,
    "grouped_matmul": _grouped_matmul,
    "moe": _moe,
    "linear_cross_entropy": _linear_cross_entropy,
}
