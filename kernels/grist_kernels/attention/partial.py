"""One run of queries against one run of keys of a longer sequence: the piece that `ring_attention` merges.

B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head width.

Query i stands at position i + offset, counted from key 0. It sees key j if j <= i + offset and, with window=W, if also
i + offset - j < W. offset is 0 for a run of tokens against itself, and may be any whole number: from S on the future hides
nothing, below zero the first queries see nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grist_kernels import backend
from grist_kernels.attention import kernel_limit
from grist_kernels.precision import upcast

_BLOCK = 128  # queries whose scores are in memory at once; on a CPU 64 to 256 are about equally fast, more is slower


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, *, offset: int, window: int | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """q (B, T, N, H), k and v (B, S, K, H) -> out (B, T, N, H), lse (B, N, T), float32 (float64 for float64 inputs).

    out is normalised over these keys alone, and lse the natural logarithm of its softmax denominator: pieces are merged with
    weights exp(lse - lse of the whole). A query that sees nothing gets out 0 and lse -inf.
    """
    if _by_triton(q, scale):
        kernel = backend.triton_kernel("attention")
        return kernel.forward(q, k, v, None, None, window, _scale(scale, q.shape[-1]), offset, torch.float32)
    B, T, N, H = q.shape
    q_BTKGH, k, v = _grouped(q, k), upcast(k), upcast(v)
    out_BTKGH = q_BTKGH.new_zeros(q_BTKGH.shape)
    lse_BKGT = q_BTKGH.new_full((B, k.shape[2], N // k.shape[2], T), float("-inf"))
    for queries, keys in _blocks(T, k.shape[1], offset, window):
        s_BKGTS = _scores(q_BTKGH, k, queries, keys, offset, window, scale)
        lse = s_BKGTS.logsumexp(-1)
        out_BTKGH[:, queries] = torch.einsum("bkgts,bskh->btkgh", _softmax(s_BKGTS, lse), v[:, keys])
        lse_BKGT[..., queries] = lse
    return out_BTKGH.view(B, T, N, H), lse_BKGT.view(B, N, T)


def partial_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    offset: int,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys contribute to dq, and these queries to dk and dv: float32 (float64 for float64 inputs).

    d_out is (B, T, N, H); lse (B, N, T), over all keys and the sink, not over these alone; delta (B, N, T) the row sums of
    d_out * out, with the out of the whole. Then p = exp(s - lse) are the probabilities of the whole, and
    ds = p * (d_out . v - delta).
    """
    if _by_triton(q, scale):
        *gradients, _ = backend.triton_kernel("attention").backward(
            d_out,
            None,
            q,
            k,
            v,
            None,
            None,
            lse,
            None,
            window,
            _scale(scale, q.shape[-1]),
            offset,
            delta,
            torch.float32,
        )
        return tuple(gradients)
    _, T, N, H = q.shape
    K = k.shape[2]
    q_BTKGH, k, v, d_out_BTKGH = _grouped(q, k), upcast(k), upcast(v), _grouped(d_out, k)
    lse_BKGT, delta_BKGT = (x.unflatten(1, (K, N // K)) for x in (lse, delta))
    dq_BTKGH = q_BTKGH.new_zeros(q_BTKGH.shape)
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    for queries, keys in _blocks(T, k.shape[1], offset, window):
        s_BKGTS = _scores(q_BTKGH, k, queries, keys, offset, window, scale)
        p_BKGTS = _softmax(s_BKGTS, lse_BKGT[..., queries])
        d_p_BKGTS = torch.einsum("btkgh,bskh->bkgts", d_out_BTKGH[:, queries], v[:, keys])
        d_s_BKGTS = d_p_BKGTS.sub_(delta_BKGT[..., queries, None]).mul_(p_BKGTS).mul_(_scale(scale, H))
        dq_BTKGH[:, queries] = torch.einsum("bkgts,bskh->btkgh", d_s_BKGTS, k[:, keys])
        dk[:, keys] += torch.einsum("bkgts,btkgh->bskh", d_s_BKGTS, q_BTKGH[:, queries])
        dv[:, keys] += torch.einsum("bkgts,btkgh->bskh", p_BKGTS, d_out_BTKGH[:, queries])
    return dq_BTKGH.view(q.shape), dk, dv


def _by_triton(q: Tensor, scale: float | None) -> bool:
    cannot = backend.cannot_take("attention", q, limit=kernel_limit(q, scale))
    return backend.implementation("attention", q.device.type, cannot) == "triton"


def _grouped(x_BTNH: Tensor, k: Tensor) -> Tensor:
    return upcast(x_BTNH).unflatten(2, (k.shape[2], -1))


def _blocks(T: int, S: int, offset: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that at least one of them sees; blocks that see nothing are left out."""
    for start in range(0, T, _BLOCK):
        end = min(start + _BLOCK, T)
        first_key = 0 if window is None else max(0, start + offset - window + 1)
        end_key = min(S, end + offset)
        if first_key < end_key:
            yield slice(start, end), slice(first_key, end_key)


def _scores(
    q_BTKGH: Tensor, k: Tensor, queries: slice, keys: slice, offset: int, window: int | None, scale: float | None
) -> Tensor:
    """Scaled logits (B, K, G, T, S) of a block, -inf where a query does not see a key."""
    q_BTKGH = q_BTKGH[:, queries] * _scale(scale, k.shape[-1])
    s_BKGTS = torch.einsum("btkgh,bskh->bkgts", q_BTKGH, k[:, keys])
    all_visible = keys.stop - 1 <= queries.start + offset and (
        window is None or queries.stop - 1 + offset - keys.start < window
    )
    if all_visible:
        return s_BKGTS
    i = torch.arange(queries.start, queries.stop, device=k.device)[:, None] + offset
    j = torch.arange(keys.start, keys.stop, device=k.device)
    hidden_TS = j > i
    if window is not None:
        hidden_TS |= i - j >= window
    return s_BKGTS.masked_fill_(hidden_TS, float("-inf"))


def _softmax(s_BKGTS: Tensor, lse_BKGT: Tensor) -> Tensor:
    # -inf - -inf would be NaN: a query that sees nothing keeps its scores of -inf instead, and gets probabilities of zero.
    shift_BKGT = lse_BKGT.masked_fill(lse_BKGT == float("-inf"), 0.0)
    return s_BKGTS.sub_(shift_BKGT[..., None]).exp_()


def _scale(scale: float | None, head_width: int) -> float:
    return head_width**-0.5 if scale is None else scale
