"""Attention to a cache in Triton: flash-decoding (Dao et al., 2023). B batch, T new tokens, N and K heads, H head width.

A few new tokens make too few programs for a GPU, so the slots are split between programs too, and a second kernel merges what
they found (attend_kernel.py). How many splits there are follows from shapes alone: nobody asks the device for the lengths, and
a graph replays for any. What each split covers follows from the lengths, on the device, so that short sequences in a long cache
use all programs too. Keys and values are read once for all query heads of their key head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grist_kernels import launch
from grist_kernels.budget import Budget
from grist_kernels.decode_attention.attend_kernel import LOG2E, _attend_kernel, _merge_kernel
from grist_kernels.launch import Config, Target, cdiv, next_power_of_2
from grist_kernels.two_faces import faces

SIZES = (64, 128, 256)  # head widths up to this size
SPLIT_SLOTS = 256  # fewer than this a split are read sooner than a second kernel is launched


def size_bucket(H: int) -> int:
    return next(size for size in SIZES if size >= H)


def attend_formula(target: Target, dtype: torch.dtype, size: int) -> Config:
    """Blocks of up to 16 KiB of keys, and as much of values; two programs a multiprocessor keep four blocks or more in flight.

    Exact float32 has no matrix units on NVIDIA, and spills with fewer threads or larger tiles.
    """
    wide = dtype == torch.float32
    most = 32 if wide else 64 if target.lanes == 64 else 128
    return {
        "ROWS": 16 if wide else 32,
        "BLOCK": max(16, min(most, 16384 // (size * dtype.itemsize))),
        "PROGRAMS": 2,
        "num_warps": 8 if wide else 4,
        "num_stages": 3 if target.architecture in ("sm_90", "sm_100") else 2,
    }


def attend_candidates(target: Target, dtype: torch.dtype, size: int) -> list[Config]:
    """For the tuner: blocks of 4 to 32 KiB, fewer or more in flight, one to four programs a multiprocessor."""
    return [
        {
            **attend_formula(target, dtype, size),
            "BLOCK": block,
            "PROGRAMS": programs,
            "num_warps": warps,
            "num_stages": stages,
        }
        for block in (16, 32, 64, 128)
        for programs in (1, 2, 4)
        for warps in (2, 4, 8)
        for stages in (2, 3, 4)
        if 4096 <= block * size * dtype.itemsize <= 32768
    ]


FORMULAS = {"attend": attend_formula}
CANDIDATES = {"attend": attend_candidates}
# 8 bytes: a register or two that a few builds spill, with Triton 3.6 others than with 3.7. Over 200 registers: gfx942 only.
BUDGETS = {
    "attend": Budget(registers=252, spilled_bytes=8, float32_spilled_bytes=8, tensor_core=True),
    "merge": Budget(registers=48),
}


def split_count(programs: int, slots: int, wanted: int) -> int:
    """Into how many splits `programs` programs, each over as many slots, are divided so that there are about `wanted`."""
    return max(1, min(wanted // max(1, programs), cdiv(slots, SPLIT_SLOTS)))


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, block_table: Tensor | None, sinks: Tensor | None,
    window: int | None, scale: float,
) -> Tensor:  # fmt: skip
    q = q if q.stride(-1) == 1 else q.contiguous()
    lengths = lengths.contiguous()
    table = lengths if block_table is None else block_table if block_table.stride(-1) == 1 else block_table.contiguous()
    (B, T, N, H), K, page = q.shape, k_cache.shape[2], k_cache.shape[1]
    slots = page if block_table is None else block_table.shape[1] * page
    window = slots if window is None else min(window, slots)
    where, device = launch.target(q.device), q.device
    config = dict(launch.config("decode_attention", "attend", where, q.dtype, size_bucket(H), attend_formula))
    rows = config["ROWS"] = min(config["ROWS"], max(16, next_power_of_2(T * N // K)))
    programs = B * K * cdiv(T * N // K, rows)
    if block_table is not None:
        config["num_stages"] += 1  # the page numbers are asked for a block before the keys
    splits = split_count(programs, window, config.pop("PROGRAMS") * where.processors)
    out = torch.empty((B, T, N, H), dtype=q.dtype, device=device)
    part, lse = (out, out) if splits == 1 else _parts(q, splits)
    sink_pointer = out if sinks is None else sinks.contiguous()
    launch.run(
        _attend_kernel, (programs, splits), device,
        q, k_cache, v_cache, lengths, table, sink_pointer, part, lse,
        B, K, T, slots, window, k_cache.shape[0], scale * LOG2E.value,
        *q.stride()[:3], *k_cache.stride(), *v_cache.stride(), table.stride(0),
        H=H, GROUP=N // K, PAGE=0 if block_table is None else page, HAS_SINKS=sinks is not None and splits == 1,
        SPLIT=splits > 1, WIDTH=max(16, next_power_of_2(H)), **config,
    )  # fmt: skip
    if splits > 1:
        width = next_power_of_2(H)
        launch.run(
            _merge_kernel, (B * T * N,), device, part, lse, sink_pointer, out, splits, N,
            H=H, HAS_SINKS=sinks is not None, SPLITS=max(8, 2048 // width), WIDTH=width, num_warps=4,
        )  # fmt: skip
    return out


def _parts(q: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """What the splits of every row find, (B, T, N, splits, H), and its logsumexp to base 2, (B, T, N, splits)."""
    B, T, N, H = q.shape
    part = torch.empty((B, T, N, splits, H), dtype=torch.float32, device=q.device)
    return part, torch.empty((B, T, N, splits), dtype=torch.float32, device=q.device)


_ATTEND = faces(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? block_table, Tensor? sinks, "
    "int? window, float scale) -> Tensor",
    _attend,
    lambda q, *_: q.new_empty(q.shape),
)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    window: int | None,
    sinks: Tensor | None,
    scale: float | None,
    block_table: Tensor | None,
) -> Tensor:
    """As grist_kernels.decode_attention, without gradients."""
    run = _ATTEND.traced if torch.compiler.is_compiling() else _ATTEND.eager
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return run(q, k_cache, v_cache, lengths, block_table, sinks, window, scale)
