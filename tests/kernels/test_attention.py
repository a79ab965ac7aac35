"""What is true of causal attention: who sees whom, how rows sum, and that it is PyTorch's and GPT-OSS's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from assertions import assert_close

from grist_kernels import attention, backend

T = 290  # two blocks of queries and a part of a third on the CPU's path


def _qkv(B=2, time=T, N=4, K=2, H=16, dtype=torch.float32):
    return (torch.randn(B, time, heads, H, dtype=dtype) for heads in (N, K, K))


@pytest.fixture(params=["auto", "reference"], autouse=True)
def _each_implementation(request):
    with backend.using(request.param):
        yield


@pytest.mark.parametrize("window", [None, 1, 20, 1000])
def test_queries_see_the_window_and_nothing_else(window):
    """A gradient shows who was read: dv of key j from the output of query i is not zero exactly if i sees j."""
    q, k, v = _qkv(B=1, N=1, K=1)
    v.requires_grad_()
    out = attention(q, k, v, window=window)
    for i in (0, 1, 19, 20, 63, 64, 65, 127, 128, T - 1):
        (dv,) = torch.autograd.grad(out[0, i].sum(), v, retain_graph=True)
        seen = (dv[0, :, 0] != 0).any(-1).nonzero().flatten().tolist()
        first = 0 if window is None else max(0, i - window + 1)
        assert seen == list(range(first, i + 1)), f"query {i}"


def test_changing_the_future_changes_nothing():
    q, k, v = _qkv()
    sinks = torch.randn(4)
    before = attention(q, k, v, sinks=sinks)
    k[:, 100:], v[:, 100:] = 7.0, -7.0
    after = attention(q, k, v, sinks=sinks)
    assert_close("past", after[:, :100], before[:, :100], atol=1e-6)
    assert (after[:, 100:] != before[:, 100:]).any()


def test_rows_sum_to_one_without_sinks_and_to_less_with():
    q, k, v = _qkv()
    ones = torch.ones_like(v)
    assert_close("row sum", attention(q, k, ones, window=20), torch.ones_like(q), atol=1e-5)
    with_sink = attention(q, k, ones, window=20, sinks=torch.zeros(4))
    assert (with_sink < 1).all()
    assert (with_sink > 0).all()
    stronger = attention(q, k, ones, window=20, sinks=torch.full((4,), 3.0))
    assert (stronger < with_sink).all()


def test_sink_of_minus_infinity_is_no_sink():
    q, k, v = _qkv()
    got = attention(q, k, v, sinks=torch.full((4,), -torch.inf))
    assert_close("out", got, attention(q, k, v), atol=1e-6)


def test_lse_includes_the_sink():
    q, k, v = _qkv(N=2, K=2)
    sinks = torch.randn(2)
    out, lse = attention(q, k, v, sinks=sinks, return_lse=True)
    score = torch.einsum("btnh,bsnh->bnts", q, k) * 16**-0.5
    score = score.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    want = torch.cat((score, sinks.view(1, 2, 1, 1).expand(2, 2, T, 1)), -1).logsumexp(-1)
    assert_close("lse", lse, want, atol=1e-5)
    assert_close("out", out, attention(q, k, v, sinks=sinks), atol=1e-5)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_matches_scaled_dot_product_attention(scale):
    q, k, v = _qkv()
    want = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True, scale=scale
    )
    assert_close("out", attention(q, k, v, scale=scale), want.transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_matches_gpt_oss_of_transformers(window):
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v = _qkv()
    sinks = torch.randn(4)
    i = torch.arange(T)
    hidden = (i[:, None] < i) | ((i[:, None] - i >= window) if window else False)
    mask = torch.zeros(1, 1, T, T).masked_fill(hidden, torch.finfo(torch.float32).min)
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    want, _ = modeling.eager_attention_forward(module, *(x.transpose(1, 2) for x in (q, k, v)), mask, 16**-0.5)
    assert_close("out", attention(q, k, v, window=window, sinks=sinks), want, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"window": 30}], ids=str)
def test_packed_sequences_are_the_same_as_one_by_one(options):
    lengths = [1, 70, 0, 270, 9]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = (x[0] for x in _qkv(B=1, time=sum(lengths)))
    sinks = torch.randn(4)
    together = attention(q, k, v, cu_seqlens=ends, sinks=sinks, **options)
    for start, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        if start == end:
            continue
        alone = attention(*(x[None, start:end] for x in (q, k, v)), sinks=sinks, **options)
        assert_close(f"tokens {start} to {end}", together[start:end], alone[0], atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradcheck(window, with_sinks):
    q, k, v = (x.requires_grad_() for x in _qkv(B=1, time=7, N=2, K=1, H=4, dtype=torch.float64))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(q, k, v, sinks):
        return attention(q, k, v, window=window, sinks=sinks if with_sinks else None)

    assert torch.autograd.gradcheck(function, (q, k, v, sinks))


def test_gradcheck_through_lse():
    q, k, v = (x.requires_grad_() for x in _qkv(B=1, time=5, N=2, K=1, H=4, dtype=torch.float64))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: attention(*x[:3], sinks=x[3], return_lse=True), (q, k, v, sinks))


def test_sinks_may_have_another_type():
    q, k, v = _qkv()
    sinks = torch.randn(4).bfloat16().requires_grad_()
    attention(q, k, v, sinks=sinks).sum().backward()
    assert sinks.grad is not None
    assert sinks.grad.dtype == torch.bfloat16


def test_no_tokens():
    q, k, v = _qkv(time=0)
    assert attention(q, k, v).shape == (2, 0, 4, 16)


def test_bad_arguments_are_named():
    q, k, v = _qkv()
    with pytest.raises(ValueError, match="q a multiple of k's heads"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="window counts the query itself, so it must be at least 1, but is 0"):
        attention(q, k, v, window=0)
    with pytest.raises(ValueError, match=r"sinks must be \(4,\), one per query head, but is \(5,\)"):
        attention(q, k, v, sinks=torch.zeros(5))
    with pytest.raises(ValueError, match="use decode_attention"):
        attention(q[:, :1], k, v)
    with pytest.raises(ValueError, match="cu_seqlens belongs to packed inputs"):
        attention(q, k, v, cu_seqlens=torch.tensor([0, T]))
    with pytest.raises(ValueError, match="packed inputs need it"):
        attention(q[0], k[0], v[0])
    with pytest.raises(ValueError, match=f"must rise from 0 to {T}, the packed length"):
        attention(q[0], k[0], v[0], cu_seqlens=torch.tensor([0, T - 1]))
    with pytest.raises(ValueError, match="one floating type"):
        attention(q, k.double(), v)
