from __future__ import annotations

import pytest
import torch

from grist_model.attention import KVCache


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """What a cache has not written must not reach a result, so it is made unmistakable."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    assert torch.empty(3).isnan().all()
    with torch.no_grad():
        yield
    torch.use_deterministic_algorithms(before)


def test_truncated_tokens_are_forgotten(make_model, ids):
    model = make_model().double()
    whole = model(ids)
    cache = KVCache(model.config, batch=3, slots=24)
    model(ids[:, :10], cache=cache)
    model((ids[:, 10:17] + 1) % 97, cache=cache)  # seven wrong ones
    cache.truncate(20)  # more than there are: nothing happens
    assert cache.used == 17
    cache.truncate(10)
    assert cache.used == 10
    assert cache.lengths_B.tolist() == [10, 10, 10]
    torch.testing.assert_close(model(ids[:, 10:14], cache=cache)[:, 0], whole[:, 13])
    torch.testing.assert_close(model(ids[:, 14:], cache=cache)[:, 0], whole[:, 23])
    cache.truncate(0)
    torch.testing.assert_close(model(ids[:, :5], cache=cache)[:, 0], whole[:, 4])
    with pytest.raises(ValueError, match="0 or more, but not to -1"):
        cache.truncate(-1)


def test_truncation_cuts_only_longer_sequences(make_model, ids):
    model = make_model().double()
    whole = model(ids)
    cache = KVCache(model.config, batch=3, slots=30)
    model(ids[:, :9], cache=cache, lengths_B=torch.tensor([9, 4, 6]))
    cache.truncate(6)
    assert cache.lengths_B.tolist() == [6, 4, 6]
    logits_BV = model(torch.stack([ids[0, 6], ids[1, 4], ids[2, 6]])[:, None], cache=cache)[:, 0]
    torch.testing.assert_close(logits_BV, torch.stack([whole[0, 6], whole[1, 4], whole[2, 6]]))


def test_sequences_are_replaced_and_kept_by_row(make_model, ids):
    model = make_model().double()
    whole = model(ids)
    cache = KVCache(model.config, batch=3, slots=24)
    model(ids[:, :12], cache=cache)
    joining = KVCache(model.config, batch=2, slots=6)
    model(ids[[2, 0], :6], cache=joining, lengths_B=torch.tensor([6, 3]))
    cache.replace([0, 2], joining)
    assert cache.lengths_B.tolist() == [6, 12, 3]
    logits_BV = model(torch.stack([ids[2, 6], ids[1, 12], ids[0, 3]])[:, None], cache=cache)[:, 0]
    torch.testing.assert_close(logits_BV, torch.stack([whole[2, 6], whole[1, 12], whole[0, 3]]))
    cache.keep([2, 0])
    cache.truncate(7)
    assert cache.used == 7
    logits_BV = model(torch.stack([ids[0, 4], ids[2, 7]])[:, None], cache=cache)[:, 0]
    torch.testing.assert_close(logits_BV, torch.stack([whole[0, 4], whole[2, 7]]))


def test_an_empty_cache_takes_sequences_into_some_of_its_rows(make_model, ids):
    model = make_model().double()
    cache = KVCache(model.config, batch=4, slots=24)
    joining = KVCache(model.config, batch=1, slots=9)
    model(ids[:1, :9], cache=joining)
    cache.replace([3], joining)
    logits_BV = model(ids[:1, 9:10].expand(4, 1), cache=cache)[:, 0]
    torch.testing.assert_close(logits_BV[3], model(ids[:1, :10])[0, -1])


def test_sequences_that_do_not_fit_are_refused(make_model, ids):
    model = make_model().double()
    cache = KVCache(model.config, batch=3, slots=8)
    long = KVCache(model.config, batch=2, slots=9)
    with pytest.raises(ValueError, match="no keys of layer 0 yet"):
        cache.replace([0, 1], long)
    model(ids[:2, :9], cache=long)
    with pytest.raises(
        ValueError, match="2 rows of a cache of 8 slots cannot become the 2 sequences, of up to 9 tokens"
    ):
        cache.replace([0, 1], long)
    with pytest.raises(ValueError, match="1 rows"):
        cache.replace([0], long)
