"""Ring attention: causal attention over a sequence that is spread over several ranks (context parallelism).

B batch, T tokens of one rank, N query heads, K key/value heads, H head width, W ranks.

Queries stay where they are; keys and values go around the ring, and every rank attends to those of each visitor (Liu et al.,
"Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023). Under a causal mask consecutive shares would
leave the first ranks idle, so the sequence is cut into 2W chunks and rank r holds chunks r and 2W-1-r, zig-zag: at each stop
of the ring every rank computes the same number of pairs of chunks (as in zhuzilin/ring-flash-attention).

Backward is a second pass around the ring, with the lse of the whole softmax: gradients of keys and values travel with them in
float32, collect a share at each stop, and end at home.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from grist_kernels.attention import attention, check_heads, check_options, partial
from grist_kernels.precision import upcast

# Two streams of messages are under way at once; NCCL ignores tags and keeps the order in which all ranks post them.
_KEYS_AND_VALUES, _GRADIENTS = 0, 1


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """This rank's share of causal attention: q (B, T, N, H), k and v (B, T, K, H) as of `zigzag_split` -> out (B, T, N, H).

    Equal to `attention` of the merged sequence of W * T tokens; window, sinks (N,) and scale are those of `attention`. What
    depends on positions, rope above all, needs those of `zigzag_positions`. Shapes, types and options are alike on all ranks.

    group: the ranks that share the sequence (gloo on a CPU, NCCL on CUDA), None for the default group; a group of one runs
    `attention`. Exchanges are collective: every rank of the group calls this, and its backward, equally often and in the same
    order. A window makes the ring skip the stops at which no rank would see anything.

    Differentiable in q, k, v and sinks. dq, dk and dv are those of the sum of all ranks' losses. The gradient of sinks is this
    rank's share of it, to be summed over the group like that of every replicated parameter. Pieces are merged in float32
    (float64 for float64 inputs) in a fixed order, so that the same number of ranks gives the same bits; out has q's type.

    Raises ValueError if shapes, types or options do not fit, or if this process is not in the group.
    """
    _check(q, k, v, window, sinks)
    group = dist.group.WORLD if group is None else group
    world = dist.get_world_size(group)
    if world < 1:
        raise ValueError(
            "ring_attention: this process is not a member of group: call it on the ranks of the group only"
        )
    if world == 1:
        return attention(q, k, v, window=window, sinks=sinks, scale=scale)
    assert group is not None  # without a default group get_world_size has raised
    ring = _Ring(group, dist.get_rank(group), world, q.shape[1] // 2, window, scale)
    return _apply(q, k, v, sinks, ring)


def zigzag_split(x: Tensor, rank: int, world: int, dim: int = 1) -> Tensor:
    """Rank's share of x: of 2 * world equal chunks along dim, number `rank` and number 2 * world - 1 - rank, in this order.

    Raises ValueError if x cannot be cut into 2 * world equal chunks, or there is no such rank.
    """
    _check_split(x.shape[dim], rank, world)
    chunks = x.chunk(2 * world, dim)
    return torch.cat([chunks[i] for i in _chunks_of(rank, world)], dim)


def zigzag_merge(shares: Sequence[Tensor] | Tensor, dim: int = 1) -> Tensor:
    """The whole from the shares of all ranks, in the order of the ranks: the inverse of `zigzag_split`.

    shares: a list, or one tensor with a leading axis of ranks; dim is an axis of one share.

    Raises ValueError if a share is not two chunks of equal length.
    """
    world = len(shares)
    chunks: dict[int, Tensor] = {}
    for rank in range(world):
        share = shares[rank]
        if share.shape[dim] % 2:
            raise ValueError(
                f"zigzag_merge: a share holds two chunks of equal length, so axis {dim} must be even, "
                f"but that of rank {rank} is {share.shape[dim]}"
            )
        chunks |= dict(zip(_chunks_of(rank, world), share.tensor_split(2, dim), strict=True))
    return torch.cat([chunks[i] for i in range(2 * world)], dim)


def zigzag_positions(rank: int, world: int, T: int, device: torch.device | str | None = None) -> Tensor:
    """(T / world,) int64: where in the whole sequence of T tokens those of a rank stand, for rope.

    Raises ValueError if T is not a multiple of 2 * world, or there is no such rank.
    """
    return zigzag_split(torch.arange(T, device=device), rank, world, dim=0)


@dataclass(frozen=True)
class _Ring:
    """chunk: its length in tokens, half a rank's share."""

    group: dist.ProcessGroup
    rank: int
    world: int
    chunk: int
    window: int | None
    scale: float | None


@torch.compiler.disable(reason="the order of exchanges and computing is not a compiler's to change")
def _apply(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ring: _Ring) -> Tensor:
    return _RingAttention.apply(q, k, v, sinks, ring)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ring: _Ring) -> Tensor:
        out, lse_BNT = _merged(q, k, v, ring)
        if sinks is not None:
            sinks_N1 = sinks.to(lse_BNT.dtype)[:, None]
            out.mul_(_as_weight(torch.sigmoid(lse_BNT - sinks_N1)))
            lse_BNT = torch.logaddexp(lse_BNT, sinks_N1)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse_BNT)
        ctx.ring = ring
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: Tensor):
        q, k, v, sinks, out, lse_BNT = ctx.saved_tensors
        delta_BNT = (upcast(d_out) * upcast(out)).sum(-1).transpose(1, 2)
        dq, (dk, dv) = _gradients(d_out, q, k, v, lse_BNT, delta_BNT, ctx.ring)
        d_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            sinks_N1 = sinks.to(lse_BNT.dtype)[:, None]
            d_sinks = -(torch.exp(sinks_N1 - lse_BNT) * delta_BNT).sum((0, 2)).to(sinks.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_sinks, None


def _merged(q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> tuple[Tensor, Tensor]:
    """out (B, T, N, H) and lse (B, N, T) over all keys of the ring, in float32, without sinks."""
    B, T, N, _ = q.shape
    out = upcast(q.new_zeros(q.shape))
    lse_BNT = out.new_full((B, N, T), float("-inf"))
    for owner, _, (k_there, v_there) in _visits(k, v, ring):
        for queries, keys, offset in _pairs(ring, owner):
            piece, piece_lse = partial.partial_attention(
                q[:, queries], k_there[:, keys], v_there[:, keys],
                offset=offset, window=ring.window, scale=ring.scale,
            )  # fmt: skip
            before = lse_BNT[..., queries]
            out[:, queries].lerp_(piece, _as_weight(torch.sigmoid(piece_lse - before)))
            lse_BNT[..., queries] = torch.logaddexp(before, piece_lse)
    return out, lse_BNT


def _gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse_BNT: Tensor, delta_BNT: Tensor, ring: _Ring
) -> tuple[Tensor, Tensor]:
    """dq (B, T, N, H), and dk and dv (2, B, T, K, H), in float32."""
    dq = lse_BNT.new_zeros(q.shape)
    arriving = None
    for owner, hop, kv_there in _visits(k, v, ring):
        d_kv = lse_BNT.new_zeros(kv_there.shape)
        for queries, keys, offset in _pairs(ring, owner):
            dq_piece, dk_piece, dv_piece = partial.partial_attention_backward(
                d_out[:, queries], q[:, queries], kv_there[0][:, keys], kv_there[1][:, keys],
                lse_BNT[..., queries], delta_BNT[..., queries],
                offset=offset, window=ring.window, scale=ring.scale,
            )  # fmt: skip
            dq[:, queries] += dq_piece
            d_kv[0][:, keys] += dk_piece
            d_kv[1][:, keys] += dv_piece
        # Waited for only now: what earlier stops collected travels while this one computes.
        collected = d_kv if arriving is None else arriving.wait().add_(d_kv)
        arriving = _exchange(collected, hop, ring, _GRADIENTS)
    assert arriving is not None  # a ring stops at home at least
    return dq, arriving.wait()


def _visits(k: Tensor, v: Tensor, ring: _Ring) -> Iterator[tuple[int, int, Tensor]]:
    """At each stop of the ring: who owns the visiting keys and values, how far they go next, and themselves, (2, B, T, K, H).

    The next ones travel while the caller computes. After the last stop nothing is sent; the hop is then the way home.
    """
    kv = torch.stack((k, v))
    stops = _stops(ring.world, ring.chunk, ring.window)
    for stop, next_stop in zip(stops, (*stops[1:], ring.world), strict=True):
        hop = next_stop - stop
        arriving = _exchange(kv, hop, ring, _KEYS_AND_VALUES) if next_stop < ring.world else None
        yield (ring.rank - stop) % ring.world, hop, kv
        if arriving is not None:
            kv = arriving.wait()


def _chunks_of(rank: int, world: int) -> tuple[int, int]:
    return rank, 2 * world - 1 - rank


def _pairs(ring: _Ring, owner: int) -> list[tuple[slice, slice, int]]:
    """Queries of this rank, keys of the owner, and the distance between their first tokens: every pair that sees something.

    Nearest first: a chunk meets itself before all others, and from then on its lse is finite. Merging two pieces that both
    see nothing would give NaN.
    """
    halves = slice(0, ring.chunk), slice(ring.chunk, 2 * ring.chunk)
    pairs = [
        (queries, keys, (i - j) * ring.chunk)
        for i, queries in zip(_chunks_of(ring.rank, ring.world), halves, strict=True)
        for j, keys in zip(_chunks_of(owner, ring.world), halves, strict=True)
        if _sees(i, j, ring.chunk, ring.window)
    ]
    return sorted(pairs, key=lambda pair: pair[2])


def _sees(i: int, j: int, chunk: int, window: int | None) -> bool:
    """Does a query of chunk i see a key of chunk j? The first query and the last key are nearest to each other."""
    return i == j or (i > j and (window is None or (i - j - 1) * chunk + 1 < window))


@functools.cache
def _stops(world: int, chunk: int, window: int | None) -> tuple[int, ...]:
    """How many ranks from home keys and values stop: wherever some rank sees some of them. Alike on all ranks."""
    return tuple(
        stop
        for stop in range(world)
        if any(
            _sees(i, j, chunk, window)
            for rank in range(world)
            for i in _chunks_of(rank, world)
            for j in _chunks_of((rank - stop) % world, world)
        )
    )


@dataclass(frozen=True)
class _Arriving:
    """A tensor on its way here. `sent` is kept until it has gone."""

    tensor: Tensor
    sent: Tensor
    works: list[dist.Work]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.tensor


def _exchange(sent: Tensor, hop: int, ring: _Ring, tag: int) -> _Arriving:
    """Start sending to the rank `hop` further on and receiving the same shape from the rank `hop` further back."""
    if hop == ring.world:  # once around is home: a window of one token never leaves it
        return _Arriving(sent, sent, [])
    received = torch.empty_like(sent)

    def peer(rank: int) -> int:
        return dist.get_global_rank(ring.group, rank % ring.world)

    operations = [
        dist.P2POp(dist.isend, sent, peer(ring.rank + hop), ring.group, tag),
        dist.P2POp(dist.irecv, received, peer(ring.rank - hop), ring.group, tag),
    ]
    return _Arriving(received, sent, dist.batch_isend_irecv(operations))


def _as_weight(x_BNT: Tensor) -> Tensor:
    return x_BNT.transpose(1, 2).unsqueeze(-1)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> None:
    check_heads("ring_attention", q, k, v)
    if q.dim() != 4 or q.shape[:2] != k.shape[:2]:
        raise ValueError(
            "ring_attention: q must be (B, T, N, H) and k and v (B, T, K, H), with one B and T, "
            f"but are {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.shape[1] == 0 or q.shape[1] % 2:
        raise ValueError(
            "ring_attention: each rank holds two chunks of equal length (zigzag_split), so T must be even and not 0, "
            f"but is {q.shape[1]}. Pad the whole sequence to a multiple of twice the number of ranks"
        )
    check_options("ring_attention", q, window, sinks)


def _check_split(length: int, rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(
            f"zigzag_split: rank must be at least 0 and below world, but rank is {rank} and world is {world}"
        )
    if length % (2 * world):
        raise ValueError(
            f"zigzag_split: every rank gets two of 2 * {world} equal chunks, so the length must be a multiple of {2 * world}, "
            f"but is {length}. Pad the sequence"
        )
