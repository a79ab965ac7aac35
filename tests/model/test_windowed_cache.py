"""A cache that keeps a window of the layers that see no more gives what a whole cache gives, and takes less memory."""

from __future__ import annotations

import pytest
import torch

from grist_model import generate
from grist_model.attention import KVCache


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """As in test_cache.py: what was never written must not reach a result."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    with torch.no_grad():
        yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("window", [1, 2, 5, 11])
@pytest.mark.parametrize("rollback", [0, 4])
@pytest.mark.parametrize(
    "pieces",
    [[1] * 24, [9, *[1] * 15], [14, 1, 1, 8], [3, 2, 3, 2, 3, 2, 9], [24], [2, 21, 1]],
    ids=lambda pieces: "-".join(map(str, pieces[:3])),
)
def test_pieces_of_any_length_give_the_logits_of_the_whole_sequence(make_model, ids, window, rollback, pieces):
    model = make_model(window=window, window_layers=(0, 2)).double()
    whole = model(ids)
    cache = KVCache(model.config, 3, 24, rollback=rollback)
    end = 0
    for piece in pieces:
        logits = model(ids[:, end : end + piece], cache=cache, last=piece)
        torch.testing.assert_close(logits, whole[:, end : end + piece])
        end += piece


@pytest.mark.parametrize("lengths", [[9, 4, 6], [2, 9, 1], [3, 3, 9]])
@pytest.mark.parametrize("window", [1, 3, 5])
def test_rows_of_unequal_length_move_by_themselves(make_model, ids, window, lengths):
    model = make_model(window=window).double()
    whole = model(ids)
    cache = KVCache(model.config, 3, 24, rollback=0)
    ends = torch.tensor(lengths)
    logits = model(ids[:, :9], cache=cache, lengths_B=ends)
    rows = torch.arange(3)
    for piece in (0, 1, 1, 3, 1, 7, 1, 1):
        if piece:
            new = torch.stack([row[end : end + piece] for row, end in zip(ids, ends.tolist(), strict=True)])
            logits = model(new, cache=cache)
            ends = ends + piece
        torch.testing.assert_close(logits[:, 0], whole[rows, ends - 1])


def test_memory_is_that_of_the_windows(make_model, ids):
    model = make_model(layers=4, context_length=256)
    whole, windowed = KVCache(model.config, 3, 200), KVCache(model.config, 3, 200, rollback=0)
    assert whole.nbytes == windowed.nbytes == 0  # nothing is made before the model has run
    model(ids, cache=whole)
    model(ids, cache=windowed)
    slot = 3 * 2 * 16 * 2 * 4  # sequences, key heads, width, keys and values, bytes
    assert whole.nbytes == 4 * 200 * slot
    assert windowed.nbytes == (2 * 200 + 2 * 9) * slot  # a window of 5: four tokens that stay and five that come


def test_the_last_tokens_can_be_taken_back(make_model, ids):
    model = make_model(window_layers="all").double()
    whole = model(ids)
    cache = KVCache(model.config, 3, 24, rollback=6)
    model(ids[:, :6], cache=cache)
    for start, right in ((6, 3), (9, 0), (9, 5), (14, 6), (20, 2)):
        wrong = (ids[:, start + right :][:, : 6 - right] + 1) % 97
        tried = torch.cat((ids[:, start : start + right], wrong), 1)[:, : 24 - start]
        logits = model(tried, cache=cache, last=tried.shape[1])
        torch.testing.assert_close(logits[:, :right], whole[:, start : start + right])
        cache.truncate(start + right)
    with pytest.raises(
        ValueError, match=r"can take back \d+ tokens, but truncate\(2\) asks for 20: make the cache with"
    ):
        cache.truncate(2)
    torch.testing.assert_close(model(ids[:, 22:], cache=cache)[:, 0], whole[:, -1])  # a refusal changes nothing
    cache.truncate(0)
    torch.testing.assert_close(model(ids[:, :8], cache=cache)[:, 0], whole[:, 7])


def test_rows_are_replaced_and_kept(make_model, ids):
    model = make_model(window=3).double()
    whole = model(ids)
    for joining_rollback in (0, None):
        cache = KVCache(model.config, 3, 24, rollback=0)
        model(ids[:, :12], cache=cache)
        joining = KVCache(model.config, 2, 9, rollback=joining_rollback)
        model(ids[[2, 0], :9], cache=joining, lengths_B=torch.tensor([9, 2]))
        cache.replace([0, 2], joining)
        ends = [9, 12, 2]
        rows = [2, 1, 0]
        for _ in range(9):
            new = torch.stack([ids[row, end] for row, end in zip(rows, ends, strict=True)])[:, None]
            logits_BV = model(new, cache=cache)[:, 0]
            torch.testing.assert_close(logits_BV, whole[rows, ends])
            ends = [end + 1 for end in ends]
        cache.keep([2, 0])
        cache.recount(18)
        logits_BV = model(torch.stack([ids[0, 11], ids[2, 18]])[:, None], cache=cache)[:, 0]
        torch.testing.assert_close(logits_BV, torch.stack([whole[0, 11], whole[2, 18]]))


def test_a_whole_cache_takes_no_rows_of_a_windowed_one(make_model, ids):
    model = make_model()
    windowed, whole = KVCache(model.config, 3, 20, rollback=0), KVCache(model.config, 3, 20)
    model(ids[:, :18], cache=windowed)
    with pytest.raises(ValueError, match="make both with rollback"):
        whole.replace([0, 1, 2], windowed)
    with pytest.raises(ValueError, match="rollback must be 0 or more"):
        KVCache(model.config, 3, 20, rollback=-1)


def test_long_texts_are_those_of_a_whole_cache(make_model, monkeypatch):
    model = make_model(window=4, context_length=200)
    prompts = [[1, 2, 3] * 11, [4], [5, 6] * 3]
    windowed = generate(model, prompts, max_new_tokens=90, temperature=0)
    made = KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *sizes, rollback: made(self, *sizes))
    assert generate(model, prompts, max_new_tokens=90, temperature=0) == windowed
