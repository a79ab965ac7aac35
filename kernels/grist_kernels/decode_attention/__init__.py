"""Attention of a few new tokens to a key/value cache: what generation runs."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels import backend
from grist_kernels.attention import check_heads, check_options
from grist_kernels.decode_attention import pytorch_fast, reference

_WIDEST = 256  # head width that a program of the Triton kernel has registers for


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """q (B, T, N, H), k_cache and v_cache (B, S, K, H), lengths (B,) -> out (B, T, N, H) in q's type.

    lengths (int32 or int64) counts the valid cached keys of each sequence, those of the T new tokens included: the caller
    writes them first. Query i stands at position lengths - T + i and sees the slots 0 to that position, with window=W only
    the last W of them. Slots from lengths on may hold anything. A query at a negative position (a batch padded on the left)
    gets zero. sinks (N,), window and scale as in `attention`. All strides are welcome.

    block_table (B, pages), int32 or int64: the cache is paged (Kwon et al., "PagedAttention", 2023). k_cache and v_cache are
    (number of pages, page size, K, H), of any page size, and slot s of sequence b is row s % page size of the page
    block_table[b, s // page size]. Sequences may share pages; entries for slots from lengths on may hold anything.

    Made for inference: the Triton kernel has no gradients, and a call that asks for them runs in plain PyTorch.

    Raises ValueError if shapes, types or options do not fit. Lengths and page numbers that the cache does not have raise
    ValueError on a CPU; on a GPU, where asking would wait for the device, their sequences become NaN.
    """
    _check(q, k_cache, v_cache, lengths, block_table)
    check_options("decode_attention", q, window, sinks)
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(k_cache, lengths, block_table)
    options = {"window": window, "sinks": sinks, "scale": scale, "block_table": block_table}
    choice = backend.implementation("decode_attention", q.device.type, _cannot(q, k_cache, v_cache, sinks))
    if choice == "triton":
        return backend.triton_kernel("decode_attention").decode_attention(q, k_cache, v_cache, lengths, **options)
    if choice == "pytorch" and pytorch_fast.fits(q):
        return pytorch_fast.decode_attention(q, k_cache, v_cache, lengths, **options)
    return reference.decode_attention(q, k_cache, v_cache, lengths, **options)


def _cannot(q: Tensor, k_cache: Tensor, v_cache: Tensor, sinks: Tensor | None) -> str | None:
    """Why the Triton kernel cannot take a call, if so."""
    given = (q, k_cache, v_cache) if sinks is None else (q, k_cache, v_cache, sinks)
    limit = None
    if q.shape[-1] > _WIDEST:
        limit = f"decode_attention's Triton kernel takes head widths up to {_WIDEST}, but got {q.shape[-1]}"
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        limit = (
            "decode_attention's Triton kernel has no gradients, and one was asked for: call it under torch.no_grad()"
        )
    return backend.cannot_take("decode_attention", *given, limit=limit)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, block_table: Tensor | None) -> None:
    check_heads("decode_attention", q, k_cache, v_cache)
    if q.dim() != 4 or (block_table is None and q.shape[0] != k_cache.shape[0]):
        raise ValueError(
            "decode_attention: q must be (B, T, N, H) and the caches (B, S, K, H) with the same B "
            "(paged, with a block_table: (number of pages, page size, K, H)), "
            f"but are {tuple(q.shape)} and {tuple(k_cache.shape)}"
        )
    if lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"decode_attention: lengths must be ({q.shape[0]},) int32 or int64, "
            f"but is {tuple(lengths.shape)} {lengths.dtype}"
        )
    if block_table is None:
        return
    if (
        block_table.dim() != 2
        or block_table.shape[0] != q.shape[0]
        or block_table.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"decode_attention: block_table must be ({q.shape[0]}, pages) int32 or int64, "
            f"but is {tuple(block_table.shape)} {block_table.dtype}"
        )
    if k_cache.shape[1] == 0:
        raise ValueError("decode_attention: the pages of a paged cache must have slots, but the page size is 0")


def _check_values(k_cache: Tensor, lengths: Tensor, block_table: Tensor | None) -> None:
    """Where that needs no synchronisation."""
    page_size = k_cache.shape[1]
    slots = page_size if block_table is None else block_table.shape[1] * page_size
    counts = lengths.tolist() or [0]
    if min(counts) < 0 or max(counts) > slots:
        raise ValueError(
            f"decode_attention: lengths must be between 0 and the cache's {slots} slots, "
            f"but range from {min(counts)} to {max(counts)}"
        )
    if block_table is None:
        return
    named = block_table[reference.used_pages(block_table, lengths, page_size)].tolist()
    if named and (min(named) < 0 or max(named) >= k_cache.shape[0]):
        raise ValueError(
            f"decode_attention: block_table must name the cache's pages, 0 to {k_cache.shape[0] - 1}, for all slots before "
            f"lengths, but its numbers range from {min(named)} to {max(named)}"
        )
