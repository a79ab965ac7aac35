"""Pieces of attention by the Triton kernels in the watched interpreter: what `ring_attention` merges on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from assertions import assert_close

from grist_kernels import OPS, backend
from grist_kernels.attention.partial import partial_attention, partial_attention_backward
from grist_kernels.attention.reference import masked_attention
from grist_kernels.cases import Case, expected, normal, run

pytest.importorskip("triton")
if not backend.INTERPRETING:
    pytest.skip("needs TRITON_INTERPRET=1, and triton not yet imported without it", allow_module_level=True)

import interpreter_shim
from interpreter_sanitizer import sanitized

interpreter_shim.install()

T, S = 130, 83  # blocks of 32 in float32: whole ones, and rests
NAMES = ("out", "lse", "dq", "dk", "dv")


def _inputs(keys: int = S, dtype: torch.dtype = torch.float32):
    return [torch.randn(2, time, heads, 20, dtype=dtype) for time, heads in ((T, 4), (keys, 2), (keys, 2), (T, 4))]


def _piece(q, k, v, d_out, lse, delta, **options):
    """What a piece gives with statistics that are those of the whole."""
    with backend.using("triton"), sanitized() as report:
        out, own_lse = partial_attention(q, k, v, **options)
        gradients = partial_attention_backward(d_out, q, k, v, lse, delta, **options)
    assert report.launches == ["_forward_kernel", "_dq_kernel", "_dkv_kernel"]
    for launched in report.runs:
        assert not any(launched.unwritten.values()), f"{launched.kernel} left elements unwritten: {launched.unwritten}"
    return out, own_lse, *gradients


@pytest.mark.parametrize("window", [None, 1, 20, 70])
@pytest.mark.parametrize("offset", [0, 1, 33, S - 1, S, 300, -5, -200])
def test_a_piece_matches_the_definition(offset, window):
    q, k, v, d_out = _inputs()
    # Some statistics of a whole that holds more than these keys.
    lse, delta = torch.randn(2, 4, T) + 6, torch.randn(2, 4, T)
    got = _piece(q, k, v, d_out, lse, delta, offset=offset, window=window, scale=0.3)
    i, j = torch.arange(T)[:, None] + offset, torch.arange(S)
    visible = (j <= i) & (i - j < (10**6 if window is None else window))
    q, k, v, d_out, lse, delta = (x.double() for x in (q, k, v, d_out, lse, delta))
    out, own_lse = masked_attention(q, k, v, visible, None, 0.3)
    with backend.using("reference"):
        options = {"offset": offset, "window": window, "scale": 0.3}
        gradients = partial_attention_backward(d_out, q, k, v, lse, delta, **options)
    for name, have, want in zip(NAMES, got, (out, own_lse, *gradients), strict=True):
        largest = float(want[want.isfinite()].abs().max()) if want.isfinite().any() else 0.0
        assert_close(name, have, want, atol=1e-5 * max(largest, 1.0))
    sees_nothing = ~visible.any(-1)
    assert (got[0][:, sees_nothing] == 0).all()
    assert (got[1].isneginf() == sees_nothing).all()


@pytest.mark.parametrize(("offset", "window"), [(-T, None), (S + 19, 20), (-1000, 3), (1000, 100)])
def test_keys_that_nobody_sees_are_not_read(offset, window):
    q, k, v, d_out = _inputs()
    k[:], v[:] = torch.nan, torch.nan
    lse = torch.zeros(2, 4, T)
    out, own_lse, *gradients = _piece(q, k, v, d_out, lse, lse, offset=offset, window=window, scale=None)
    assert (out == 0).all()
    assert own_lse.isneginf().all()
    for name, gradient in zip(NAMES[2:], gradients, strict=True):
        assert not gradient.any(), name


def _whole(q, k, v, sinks, window, scale):
    """attention, by merging pieces of keys as the ring does; gradients by hand."""

    class FromPieces(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, sinks):
            cuts = [0, 1, 45, 100, q.shape[1]]
            ctx.pieces = [
                (slice(a, b), {"offset": -a, "window": window, "scale": scale}) for a, b in itertools.pairwise(cuts)
            ]
            parts = [partial_attention(q, k[:, keys], v[:, keys], **where) for keys, where in ctx.pieces]
            lses = [lse for _, lse in parts] + (
                [] if sinks is None else [sinks.float()[:, None].expand_as(parts[0][1])]
            )
            lse = torch.stack(lses).logsumexp(0)
            weighted = [part * (part_lse - lse).exp().transpose(1, 2)[..., None] for part, part_lse in parts]
            out = torch.stack(weighted).sum(0)
            ctx.save_for_backward(q, k, v, sinks, out, lse)
            return out.to(q.dtype)

        @staticmethod
        def backward(ctx, d_out):
            q, k, v, sinks, out, lse = ctx.saved_tensors
            delta = (d_out.float() * out).sum(-1).transpose(1, 2)
            pieces = [
                partial_attention_backward(d_out, q, k[:, keys], v[:, keys], lse, delta, **where)
                for keys, where in ctx.pieces
            ]
            assert all(gradient.dtype == torch.float32 for piece in pieces for gradient in piece)
            dq, dk, dv = zip(*pieces, strict=True)
            d_sinks = None if sinks is None else -((sinks.float()[:, None] - lse).exp() * delta).sum((0, 2)).to(q.dtype)
            return (
                torch.stack(dq).sum(0).to(q.dtype),
                torch.cat(dk, 1).to(q.dtype),
                torch.cat(dv, 1).to(q.dtype),
                d_sinks,
            )

    return FromPieces.apply(q, k, v, sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("window", [None, 1, 20, 110])
def test_pieces_add_up_to_the_whole(window, sinks, dtype):
    def build(generator):
        arguments = {"q": normal(generator, 2, T, 4, 16), "window": window, "scale": 0.3}
        arguments |= {name: normal(generator, 2, T, 2, 16) for name in ("k", "v")}
        return arguments | ({"sinks": normal(generator, 4)} if sinks else {})

    # The caller's delta is rowsum(d_out * out), whose rounding does not cancel against that of d_p (as rowsum(p * d_p) does).
    case = Case("pieces", build, ("q", "k", "v", *(("sinks",) if sinks else ())), gradient_factor=3.0)
    arguments = case.arguments(dtype)
    with backend.using("triton"):
        got = run(lambda sinks=None, **given: _whole(**given, sinks=sinks), arguments, case.gradients)
    for name, value in expected(OPS["attention"].reference, case, arguments).items():
        # One key and no sink: the gradient of the query is zero, and a difference of two equal sums is nearly that.
        allowed = value.allowed if value.want.any() else 1e-5
        assert_close(name, got[name], value.want, allowed=allowed)


def test_results_are_float32():
    """Of bfloat16 inputs nothing is rounded before the pieces are merged."""
    q, k, v, d_out = _inputs(dtype=torch.bfloat16)
    lse, delta = torch.randn(2, 4, T) + 6, torch.randn(2, 4, T)
    got = _piece(q, k, v, d_out, lse, delta, offset=S, window=None, scale=None)
    assert [x.dtype for x in got] == [torch.float32] * 5
    assert (got[0] != got[0].bfloat16()).any()


def test_any_strides_are_welcome():
    q, k, v, d_out = _inputs()
    lse, delta = torch.randn(2, 4, T) + 6, torch.randn(2, 4, T)
    options = {"offset": 40, "window": 70, "scale": None}
    want = _piece(q, k, v, d_out, lse, delta, **options)
    q, k, v, d_out = (x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (q, k, v, d_out))
    lse, delta = (x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (lse, delta))
    assert q.stride(-1) != 1
    assert not lse.is_contiguous()
    for name, have, expected_value in zip(NAMES, _piece(q, k, v, d_out, lse, delta, **options), want, strict=True):
        assert torch.equal(have, expected_value), name


def test_what_the_kernels_cannot_take_runs_in_plain_pytorch_or_is_an_error():
    q, k, v, _ = _inputs(dtype=torch.float64)
    options = {"offset": 0, "window": None, "scale": None}
    assert partial_attention(q, k, v, **options)[0].dtype == torch.float64
    with backend.using("triton"), pytest.raises(RuntimeError, match=r"got torch\.float64"):
        partial_attention(q, k, v, **options)
