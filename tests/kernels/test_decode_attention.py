"""Generation step by step must give what attention gives at once, whether its cache is in one piece or in pages."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_close

from grist_kernels import attention, backend, decode_attention
from grist_kernels.decode_attention.cases import paged

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


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("page_size", [1, 5, 20])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_where_pages_lie_changes_nothing(options, page_size, mode):
    q, k, v, sinks = _inputs(T=40)
    k[1, 9:], v[1, 9:] = torch.nan, torch.nan
    lengths = torch.tensor([37, 9])
    arguments = {"q": q[:, :2], "k_cache": k, "v_cache": v, "lengths": lengths, "sinks": sinks, **options}
    want = decode_attention(**arguments)
    cut = paged(arguments, page_size, torch.Generator().manual_seed(0))
    assert (cut["block_table"][1] == -1).any()
    with backend.using(mode):
        assert_close("out", decode_attention(**cut), want, atol=1e-6)


def test_steps_with_pages_that_are_handed_out_as_they_are_needed():
    q, k, v, sinks = _inputs()
    want = attention(q, k, v, sinks=sinks)
    k_pages, v_pages = torch.empty(12, 4, 2, 16), torch.empty(12, 4, 2, 16)  # NaN, as all fresh memory in tests
    free = torch.randperm(12).tolist()
    table = torch.full((2, 6), -1, dtype=torch.int32)
    for t in range(23):
        for b in range(2):
            if t % 4 == 0:
                table[b, t // 4] = free.pop()
            k_pages[table[b, t // 4], t % 4], v_pages[table[b, t // 4], t % 4] = k[b, t], v[b, t]
        lengths = torch.tensor([t + 1, t + 1])
        got = decode_attention(q[:, t : t + 1], k_pages, v_pages, lengths, sinks=sinks, block_table=table)
        assert_close(f"token {t}", got, want[:, t : t + 1], atol=1e-5)


def test_sequences_may_share_pages():
    q, k, v, _ = _inputs(T=20)
    k[1], v[1] = k[0], v[0]
    want = decode_attention(q[:, :1], k, v, torch.tensor([20, 13]))
    k_pages, v_pages = (x[0].unflatten(0, (5, 4)) for x in (k, v))
    table = torch.arange(5).expand(2, 5)
    got = decode_attention(q[:, :1], k_pages, v_pages, torch.tensor([20, 13]), block_table=table)
    assert_close("out", got, want, atol=1e-6)


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


def test_bad_block_tables_are_named():
    q = _inputs()[0]
    pages, lengths = torch.randn(6, 8, 2, 16), torch.tensor([23, 9])
    table = torch.tensor([[0, 1, 2], [3, 4, -1]], dtype=torch.int32)
    decode_attention(q, pages, pages, lengths, block_table=table)
    for wrong, what in ((table[:1], r"\(1, 3\) torch.int32"), (table.float(), r"\(2, 3\) torch.float32")):
        with pytest.raises(ValueError, match=rf"block_table must be \(2, pages\) int32 or int64, but is {what}"):
            decode_attention(q, pages, pages, lengths, block_table=wrong)
    with pytest.raises(ValueError, match="must have slots, but the page size is 0"):
        decode_attention(q, pages[:, :0], pages[:, :0], lengths, block_table=table)
    with pytest.raises(ValueError, match="lengths must be between 0 and the cache's 24 slots, but range from 9 to 25"):
        decode_attention(q, pages, pages, torch.tensor([25, 9]), block_table=table)
    for page in (-1, 6):
        table[1, 1] = page
        with pytest.raises(ValueError, match=r"must name the cache's pages, 0 to 5, for all .* but its numbers range"):
            decode_attention(q, pages, pages, lengths, block_table=table)
    with pytest.raises(ValueError, match=r"the same B \(paged, with a block_table"):
        decode_attention(q, pages, pages, lengths)
