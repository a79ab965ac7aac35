"""Which rows belong to which expert, found on the device: no host waits for it, so a CUDA graph can hold it.

T tokens, A active experts per token, E experts, R rows sorted by expert. A pair is a token and one of its A choices; pair p is
token p // A. Sorting is stable and by counting, in a fixed order: no atomics, the same bits on every run.

    route     expert ids -> where every pair goes (place), which pair every row is (pair), where experts end (ends)
    schedule  ends -> the tiles of BLOCK rows that a grouped product walks through

How many tiles there are depends on the data, but not how many there can be: each expert wastes less than one tile, so
cdiv(R, BLOCK) + min(E, R) programs are enough whatever the router chose, and those without a tile end at once.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (Device code is Python by its looks only: the compiler gives names, loops and calls other types than Python has.)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grist_kernels import launch
from grist_kernels.launch import cdiv, next_power_of_2

CHUNK = 256  # pairs that one program sorts by comparing each with each
_COMPARED = 16  # pairs, or experts, compared at a time: 4,096 comparisons for 256 threads


@triton.jit
def _load_experts(ids_ptr, pairs, n_pairs, n_experts):
    """Expert ids as int32. One out of range, and one beyond the last pair, becomes n_experts: nobody's."""
    ids = tl.load(ids_ptr + pairs, mask=pairs < n_pairs, other=-1)
    return tl.where((ids < 0) | (ids >= n_experts), n_experts, ids).to(tl.int32)


@triton.jit
def _rank(
    ids_ptr, ids, pairs, first, n_pairs, n_experts, SMALLER: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr
):
    """For each pair of a chunk, how many of the chunk come before it: of its expert, or (SMALLER) of those before too."""
    rank = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, CHUNK, STEP):
        others = first + start + tl.arange(0, STEP)
        other_ids = _load_experts(ids_ptr, others, n_pairs, n_experts)
        before = (other_ids[None, :] == ids[:, None]) & (others[None, :] < pairs[:, None])
        if SMALLER:
            before = before | (other_ids[None, :] < ids[:, None])
        rank += tl.sum(before.to(tl.int32), 1)
    return rank


@triton.jit
def _store_places(place_ptr, pair_ptr, pairs, places, ids, n_pairs, n_experts):
    known = (pairs < n_pairs) & (ids < n_experts)
    tl.store(place_ptr + pairs, tl.where(known, places, -1), mask=pairs < n_pairs)
    tl.store(pair_ptr + places, pairs, mask=known)


@triton.jit
def _route_small_kernel(
    ids_ptr, place_ptr, pair_ptr, ends_ptr, n_pairs, n_experts, CHUNK: tl.constexpr, STEP: tl.constexpr
):
    """All pairs in one program: a pair's place is the number of pairs before it."""
    pairs = tl.arange(0, CHUNK)
    ids = _load_experts(ids_ptr, pairs, n_pairs, n_experts)
    places = _rank(ids_ptr, ids, pairs, 0, n_pairs, n_experts, True, CHUNK, STEP)
    _store_places(place_ptr, pair_ptr, pairs, places, ids, n_pairs, n_experts)
    for first in range(0, n_experts, STEP):
        experts = first + tl.arange(0, STEP)
        ends = tl.sum((ids[:, None] <= experts[None, :]).to(tl.int32), 0)
        tl.store(ends_ptr + experts, ends, mask=experts < n_experts)


@triton.jit
def _count_kernel(ids_ptr, counts_ptr, n_pairs, n_experts, CHUNK: tl.constexpr, STEP: tl.constexpr):
    chunk = tl.program_id(0)
    ids = _load_experts(ids_ptr, chunk * CHUNK + tl.arange(0, CHUNK), n_pairs, n_experts)
    counts_ptr += chunk * n_experts  # in 32 bits: see route
    for first in range(0, n_experts, STEP):
        experts = first + tl.arange(0, STEP)
        counts = tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), 0)
        tl.store(counts_ptr + experts, counts, mask=experts < n_experts)


@triton.jit
def _scan_kernel(
    counts_ptr, before_ptr, starts_ptr, ends_ptr, n_chunks, n_experts, CHUNKS: tl.constexpr, EXPERTS: tl.constexpr
):
    """One program: how many pairs of each expert lie in earlier chunks, and where each expert starts and ends."""
    experts = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, n_chunks, CHUNKS):
        chunks = first + tl.arange(0, CHUNKS)[:, None]
        offsets = chunks * n_experts + experts[None, :]
        mask = (chunks < n_chunks) & (experts[None, :] < n_experts)
        counts = tl.load(counts_ptr + offsets, mask=mask, other=0)
        tl.store(before_ptr + offsets, total[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        total += tl.sum(counts, 0)
    ends = tl.cumsum(total, 0)
    tl.store(ends_ptr + experts, ends, mask=experts < n_experts)
    tl.store(starts_ptr + experts, ends - total, mask=experts < n_experts)


@triton.jit
def _place_kernel(
    ids_ptr, before_ptr, starts_ptr, place_ptr, pair_ptr, n_pairs, n_experts, CHUNK: tl.constexpr, STEP: tl.constexpr
):
    chunk = tl.program_id(0)
    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = _load_experts(ids_ptr, pairs, n_pairs, n_experts)
    known = ids < n_experts
    places = tl.load(starts_ptr + ids, mask=known, other=0)
    places += tl.load(before_ptr + chunk * n_experts + ids, mask=known, other=0)
    places += _rank(ids_ptr, ids, pairs, chunk * CHUNK, n_pairs, n_experts, False, CHUNK, STEP)
    _store_places(place_ptr, pair_ptr, pairs, places, ids, n_pairs, n_experts)


@triton.jit
def _schedule_kernel(
    ends_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, n_rows, n_experts, n_tiles,
    SPARE: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """With SPARE the rows beyond the last end are those of one expert more, number n_experts."""
    experts = tl.arange(0, EXPERTS)
    count = n_experts + 1 if SPARE else n_experts
    # Ends are whatever a caller passed: inside [0, n_rows] no product leaves its tensors, and in order none runs backwards.
    ends = tl.load(ends_ptr + experts, mask=experts < n_experts, other=n_rows).to(tl.int32)
    starts = tl.load(ends_ptr + experts - 1, mask=(experts > 0) & (experts <= n_experts), other=0).to(tl.int32)
    starts = tl.minimum(tl.maximum(starts, 0), n_rows)
    ends = tl.minimum(tl.maximum(ends, starts), n_rows)
    tiles = tl.where(experts < count, tl.cdiv(ends - starts, BLOCK), 0)
    cumulative = tl.cumsum(tiles, 0)
    numbers = tl.program_id(0) * TILES + tl.arange(0, TILES)
    passed = (cumulative[None, :] <= numbers[:, None]) & (experts[None, :] < count)
    expert = tl.sum(passed.to(tl.int32), 1)
    mine = experts[None, :] == expert[:, None]
    row = numbers * BLOCK + tl.sum(tl.where(mine, (starts - (cumulative - tiles) * BLOCK)[None, :], 0), 1)
    tl.store(tile_expert_ptr + numbers, tl.where(expert < count, expert, -1), mask=numbers < n_tiles)
    tl.store(tile_row_ptr + numbers, row, mask=numbers < n_tiles)
    if tl.program_id(0) == 0:
        tl.store(starts_ptr + experts, starts, mask=experts < count)
        tl.store(starts_ptr + count, tl.sum(tl.where(experts == count - 1, ends, 0), 0))


class Routing(NamedTuple):
    """Pairs sorted by expert; all int32. An id that is no expert's has no row, and place -1.

    place (T * A,): the row of each pair. pair (R,): the pair of each row. ends (E,): where each expert's rows end.
    """

    place: Tensor
    pair: Tensor
    ends: Tensor


def route(expert_ids: Tensor, n_experts: int) -> Routing:
    """expert_ids (T, A) int32 or int64 -> Routing; rows of one expert keep the order of their pairs.

    Raises ValueError for a billion pairs or so: rows, and counts of each expert's in every chunk, are numbered in 32 bits.
    """
    ids = expert_ids.reshape(-1)
    device, n_pairs = ids.device, ids.shape[0]
    if max(n_pairs, cdiv(n_pairs, CHUNK) * n_experts) >= 2**31:
        raise ValueError(
            f"{n_pairs} pairs of token and expert, and {n_experts} experts, are more than 32 bits can number: "
            "use micro-batches of fewer tokens"
        )
    place, pair = (torch.empty(n_pairs, dtype=torch.int32, device=device) for _ in range(2))
    ends = torch.empty(n_experts, dtype=torch.int32, device=device)
    sizes = {"CHUNK": CHUNK, "STEP": _COMPARED, "num_warps": 8}
    if n_pairs <= CHUNK:
        launch.run(_route_small_kernel, (1,), device, ids, place, pair, ends, n_pairs, n_experts, **sizes)
        return Routing(place, pair, ends)
    chunks = cdiv(n_pairs, CHUNK)
    counts, before = (torch.empty((chunks, n_experts), dtype=torch.int32, device=device) for _ in range(2))
    starts = torch.empty_like(ends)
    launch.run(_count_kernel, (chunks,), device, ids, counts, n_pairs, n_experts, **sizes)
    padded = max(16, next_power_of_2(n_experts))
    launch.run(
        _scan_kernel, (1,), device, counts, before, starts, ends, chunks, n_experts,
        CHUNKS=max(1, 4096 // padded), EXPERTS=padded, num_warps=8,
    )  # fmt: skip
    launch.run(_place_kernel, (chunks,), device, ids, before, starts, place, pair, n_pairs, n_experts, **sizes)
    return Routing(place, pair, ends)


class Schedule(NamedTuple):
    """Tiles of rows, each of one expert; all int32.

    starts (E + 1,): expert e has rows starts[e] to starts[e + 1]; with spare rows (E + 2,), and theirs are expert E's.
    tile_expert: the expert of each tile, -1 if there is no such tile. tile_row: its first row.
    """

    starts: Tensor
    tile_expert: Tensor
    tile_row: Tensor

    @property
    def tiles(self) -> int:
        """Programs enough for any routing."""
        return self.tile_expert.shape[0]


def schedule(ends: Tensor, n_rows: int, block: int, spare: bool = False) -> Schedule:
    """ends (E,) int32 or int64, where the rows of each expert end -> the tiles of `block` rows.

    spare: rows beyond the last end get tiles too, as those of expert E.
    """
    n_experts = ends.shape[0]
    n_tiles = cdiv(n_rows, block) + min(n_experts + spare, n_rows)
    starts = torch.empty(n_experts + 1 + spare, dtype=torch.int32, device=ends.device)
    tile_expert, tile_row = (torch.empty(n_tiles, dtype=torch.int32, device=ends.device) for _ in range(2))
    padded = max(16, next_power_of_2(n_experts + spare))
    tiles = max(1, 4096 // padded)
    launch.run(
        _schedule_kernel, (max(1, cdiv(n_tiles, tiles)),), ends.device, ends, starts, tile_expert, tile_row, n_rows,
        n_experts, n_tiles, SPARE=spare, BLOCK=block, EXPERTS=padded, TILES=tiles, num_warps=4,
    )  # fmt: skip
    return Schedule(starts, tile_expert, tile_row)
