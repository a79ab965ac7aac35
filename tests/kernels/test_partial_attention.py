"""Pieces of attention: what a run of queries sees of a run of keys, and that pieces add up to the whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from assertions import assert_close

from grist_kernels import attention
from grist_kernels.attention import partial
from grist_kernels.attention.partial import partial_attention, partial_attention_backward
from grist_kernels.attention.reference import masked_attention

BLOCK = partial._BLOCK
T, S = 2 * BLOCK + 34, BLOCK + 19  # three blocks of queries


def _inputs(B=2, queries=T, keys=S, N=4, K=2, H=6, dtype=torch.float64):
    return (torch.randn(B, time, heads, H, dtype=dtype) for time, heads in ((queries, N), (keys, K), (keys, K)))


def _visible(offset: int, window: int | None):
    i, j = torch.arange(T)[:, None] + offset, torch.arange(S)
    return (j <= i) & (i - j < (10**6 if window is None else window))


# The last offset before a block sees all keys, and the window that hides just one of them from a block, are edges.
@pytest.mark.parametrize("window", [None, 1, 20, 200, S + BLOCK - 1])
@pytest.mark.parametrize("offset", [0, 1, 33, S - 2, S - 1, S, 300, -5, -200])
def test_matches_the_definition(offset, window):
    q, k, v = _inputs()
    out, lse = partial_attention(q, k, v, offset=offset, window=window, scale=0.3)
    visible = _visible(offset, window)
    want, want_lse = masked_attention(q, k, v, visible, None, 0.3)
    assert_close("out", out, want, atol=1e-12)
    assert_close("lse", lse, want_lse, atol=1e-12)
    sees_nothing = ~visible.any(-1)
    assert (out[:, sees_nothing] == 0).all()
    assert (lse.isneginf() == sees_nothing).all()


@pytest.mark.parametrize(("offset", "window"), [(-T, None), (S + 19, 20), (-1000, 3), (1000, 100)])
def test_seeing_nothing_costs_nothing_and_gives_nothing(offset, window):
    """Keys that nobody sees are not read at all: NaN in them would show."""
    q, k, v = _inputs()
    k[:], v[:] = torch.nan, torch.nan
    out, lse = partial_attention(q, k, v, offset=offset, window=window, scale=None)
    assert (out == 0).all()
    assert lse.isneginf().all()
    gradients = partial_attention_backward(q, q, k, v, lse, lse, offset=offset, window=window, scale=None)
    for name, gradient, x in zip(("dq", "dk", "dv"), gradients, (q, k, v), strict=True):
        assert_close(name, gradient, torch.zeros_like(x))


def _whole_from_pieces(q, k, v, d_out, cuts, **options):
    """out, lse, dq, dk and dv of causal attention, with the keys cut into pieces."""
    pieces = [(slice(a, b), {"offset": -a, **options}) for a, b in itertools.pairwise(cuts)]
    parts = [partial_attention(q, k[:, keys], v[:, keys], **where) for keys, where in pieces]
    lse = torch.stack([part_lse for _, part_lse in parts]).logsumexp(0)
    out = torch.stack([part * (part_lse - lse).exp().transpose(1, 2)[..., None] for part, part_lse in parts]).sum(0)
    delta = (d_out * out).sum(-1).transpose(1, 2)
    gradients = [
        partial_attention_backward(d_out, q, k[:, keys], v[:, keys], lse, delta, **where) for keys, where in pieces
    ]
    dq, dk, dv = zip(*gradients, strict=True)
    return out, lse, torch.stack(dq).sum(0), torch.cat(dk, 1), torch.cat(dv, 1)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("window", [None, 1, 20, 150])
def test_pieces_add_up_to_the_whole(window, scale):
    q, k, v = (x.requires_grad_() for x in _inputs(keys=T))
    d_out = torch.randn_like(q)
    want, want_lse = attention(q, k, v, window=window, scale=scale, return_lse=True)
    want_gradients = torch.autograd.grad(want, (q, k, v), d_out)
    with torch.no_grad():
        got = _whole_from_pieces(q, k, v, d_out, [0, 1, 100, 230, T], window=window, scale=scale)
    for name, have, expected in zip(
        ("out", "lse", "dq", "dk", "dv"), got, (want, want_lse, *want_gradients), strict=True
    ):
        assert_close(name, have, expected, atol=1e-12)


def test_any_strides_are_welcome():
    q, k, v = _inputs(dtype=torch.float32)
    d_out = torch.randn_like(q)
    options = {"offset": 40, "window": 70, "scale": None}
    out, lse = partial_attention(q, k, v, **options)
    delta = (d_out * out).sum(-1).transpose(1, 2)
    want = out, lse, *partial_attention_backward(d_out, q, k, v, lse, delta, **options)
    q, k, v, d_out = (x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (q, k, v, d_out))
    assert q.stride(-1) != 1
    got = *partial_attention(q, k, v, **options), *partial_attention_backward(d_out, q, k, v, lse, delta, **options)
    for name, have, expected in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert_close(name, have, expected, atol=1e-5)


def test_results_are_float32():
    """Of bfloat16 inputs nothing is rounded before the pieces are merged."""
    q, k, v = _inputs(dtype=torch.bfloat16)
    options = {"offset": S, "window": None, "scale": None}
    out, lse = partial_attention(q, k, v, **options)
    want, want_lse = partial_attention(q.float(), k.float(), v.float(), **options)
    assert out.dtype == lse.dtype == torch.float32
    assert_close("out", out, want)
    assert_close("lse", lse, want_lse)
    gradients = partial_attention_backward(q, q, k, v, lse, lse, **options)
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3
