"""Generation step by step must give what attention gives at once."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_close

from grist_kernels import attention, decode_attention

OPTIONS = [{}, {"window": 5}, {"scale": 0.3}]


def _inputs(B=2, T=23, N=4, K=2, H=16):
    return torch.randn(B, T, N, H), torch.randn(B, T, K, H), torch.randn(B, T, K, H), torch.randn(N)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("step", [1, 4])
def test_steps_give_what_attention_gives_at_once(options, step):
    q, k, v, sinks = _inputs()
    want = attention(q, k, v, sinks=sinks, **options)
    k_cache, v_cache = torch.empty(2, 40, 2, 16), torch.empty(2, 40, 2, 16)  # NaN, as all fresh memory in tests
    for start in range(0, 23, step):
        end = min(start + step, 23)
        k_cache[:, start:end], v_cache[:, start:end] = k[:, start:end], v[:, start:end]
        got = decode_attention(q[:, start:end], k_cache, v_cache, torch.tensor([end, end]), sinks=sinks, **options)
        assert_close(f"tokens {start} to {end}", got, want[:, start:end], atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sequences_of_different_lengths_do_not_disturb_each_other(options):
    q, k, v, sinks = _inputs()
    lengths = torch.tensor([23, 9])
    last = torch.stack((q[0, 22:23], q[1, 8:9]))
    k[1, 9:], v[1, 9:] = torch.nan, torch.nan
    got = decode_attention(last, k, v, lengths, sinks=sinks, **options)
    for b, length in enumerate(lengths.tolist()):
        alone = attention(*(x[b : b + 1, :length] for x in (q, k, v)), sinks=sinks, **options)
        assert_close(f"sequence {b}", got[b], alone[0, -1:], atol=1e-5)


def test_padding_before_a_short_prompt_gets_zero():
    q, k, v, sinks = _inputs(T=6)
    out = decode_attention(q, k, v, torch.tensor([6, 2]), sinks=sinks)
    assert_close("padding", out[1, :4], torch.zeros(4, 4, 16))
    assert_close("prompt", out[1, 4:], attention(q[1:, 4:], k[1:, :2], v[1:, :2], sinks=sinks)[0], atol=1e-5)


def test_empty_cache_gives_zero():
    q, k, v, sinks = _inputs(T=1)
    out = decode_attention(
        q, torch.full_like(k, torch.nan), torch.full_like(v, torch.nan), torch.tensor([0, 0]), sinks=sinks
    )
    assert_close("out", out, torch.zeros_like(q))


def test_bad_arguments_are_named():
    q, k, v, _ = _inputs()
    with pytest.raises(ValueError, match=r"lengths must be \(2,\) int32 or int64"):
        decode_attention(q, k, v, torch.tensor([23.0, 23.0]))
    with pytest.raises(ValueError, match="lengths must be between 0 and the cache's 23 slots, but range from 5 to 24"):
        decode_attention(q, k, v, torch.tensor([5, 24]))
    with pytest.raises(ValueError, match=r"the caches \(B, S, K, H\) with the same B"):
        decode_attention(q, k[:1], v[:1], torch.tensor([23, 23]))
    with pytest.raises(ValueError, match="window counts the query itself"):
        decode_attention(q, k, v, torch.tensor([23, 23]), window=0)
