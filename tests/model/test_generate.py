from __future__ import annotations

import pytest
import torch

from grist_model import generate, stream
from grist_model.attention import KVCache
from grist_model.generate import Sampling, sample


def greedy_without_cache(model, prompt: list[int], steps: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts": 0, "sinks": False},
        {"window_layers": "all", "tied_embeddings": True},
        {"kv_heads": 4, "yarn": None},
    ],
    ids=["gpt_oss", "dense", "windows everywhere", "plain rope"],
)
def test_greedy_equals_the_argmax_without_a_cache(make_model, ids, changes):
    model = make_model(**changes)
    prompt = ids[0, :9].tolist()
    expected = greedy_without_cache(model, prompt, 20)
    assert generate(model, prompt, max_new_tokens=20, temperature=0) == expected
    assert list(stream(model, ids[0, :9], max_new_tokens=20, temperature=0)) == expected
    assert len(set(expected)) > 1  # one id over and over is what a broken cache could give too


def test_batch_of_unequal_prompts_equals_each_alone(make_model, ids):
    model = make_model()
    prompts = [ids[0, :4].tolist(), ids[1, :11].tolist(), ids[2, :1].tolist()]
    alone = [generate(model, prompt, max_new_tokens=12, temperature=0) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=12, temperature=0) == alone
    assert generate(model, ids[:, :6], max_new_tokens=5, temperature=0) == [
        greedy_without_cache(model, row.tolist(), 5) for row in ids[:, :6]
    ]


def test_cache_gives_the_logits_of_the_whole_sequence(make_model, ids):
    model = make_model()
    cache = KVCache(model.config, batch=3, slots=24)
    with torch.no_grad():
        whole = model(ids)
        pieces = [model(piece, cache=cache) for piece in ids.split([5, 1, 7, 1, 10], dim=1)]
    for piece, end in zip(pieces, [4, 5, 12, 13, 23], strict=True):
        torch.testing.assert_close(piece[:, 0], whole[:, end])
    with pytest.raises(ValueError, match="24 slots, 24 of them used: no room for 1 more"):
        model(ids[:, :1], cache=cache)


def test_arguments_of_a_cached_call_must_fit(make_model, ids):
    model = make_model()
    with pytest.raises(ValueError, match="pass a cache"):
        model(ids, lengths_B=torch.tensor([1, 2, 3]))
    cache = KVCache(model.config, batch=3, slots=30)
    with pytest.raises(ValueError, match="keeps its own positions"):
        model(ids, cache=cache, positions_BT=ids)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="first call"):
        model(ids[:, :1], cache=cache, lengths_B=torch.tensor([1, 1, 1]))


def test_a_row_ends_with_its_stop_id(make_model, ids):
    model = make_model()
    prompts = [ids[0, :9].tolist(), ids[1, :9].tolist()]
    free = generate(model, prompts, max_new_tokens=20, temperature=0)
    stop = free[0][4]
    stopped = generate(model, prompts, max_new_tokens=20, temperature=0, stop_ids=[stop])
    for row, full in zip(stopped, free, strict=True):
        end = full.index(stop) + 1 if stop in full else len(full)
        assert row == full[:end]
    assert stopped[0][-1] == stop


def test_a_seed_fixes_the_draw_and_leaves_the_global_generator_alone(make_model, ids):
    model = make_model()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generate(model, ids[0, :5], max_new_tokens=30, temperature=2.0, seed=1)
    assert generate(model, ids[0, :5], max_new_tokens=30, temperature=2.0, seed=1) == first
    assert generate(model, ids[0, :5], max_new_tokens=30, temperature=2.0, seed=2) != first
    assert generate(model, ids[0, :5], max_new_tokens=30, temperature=2.0) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_filters_allow_exactly_the_right_ids():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).log().expand(4000, 5)

    def allowed(**options) -> set[int]:
        return set(sample(logits, Sampling(**options), torch.Generator().manual_seed(0)).tolist())

    assert allowed() == {0, 1, 2, 3, 4}
    assert allowed(top_k=2) == {0, 1}
    assert allowed(top_k=9) == {0, 1, 2, 3, 4}
    assert allowed(top_p=0.65) == {0, 1}
    assert allowed(top_p=0.75) == {0, 1, 2}
    assert allowed(top_p=0.01) == {0}
    assert allowed(min_p=0.4) == {0, 1, 2}
    assert allowed(min_p=1.0) == {0}
    assert allowed(temperature=0) == {0}
    assert allowed(top_k=4, top_p=0.95, min_p=0.2) == {0, 1, 2}


def test_draws_follow_the_probabilities():
    p = torch.tensor([0.5, 0.3, 0.2])
    drawn = sample(p.log().expand(40000, 3), Sampling(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.bincount(drawn) / 40000, p, atol=0.01, rtol=0)
    sharper = sample(p.log().expand(40000, 3), Sampling(temperature=0.5), torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.bincount(sharper) / 40000, p.square() / p.square().sum(), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 60}, "a prompt of 5 ids and max_new_tokens=60 exceed the context_length of 64"),
    ],
)
def test_bad_options_are_named(make_model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model(), [1, 2, 3, 4, 5], **({"max_new_tokens": 4} | options))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([[1], []], "a prompt of the batch is empty"),
        ([5, 97], "prompt id 97 is outside the model's vocabulary of 97"),
        ([-1], "prompt id -1"),
        ([0.5], "integer ids"),
        (["ab"], "integer ids"),
    ],
)
def test_bad_prompts_are_named(make_model, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model(), prompt, max_new_tokens=2)


def test_stream_takes_one_prompt(make_model):
    with pytest.raises(ValueError, match="a batch of 2"):
        next(stream(make_model(), [[1], [2]], max_new_tokens=2))  # pyright: ignore[reportArgumentType]


def test_gradients_are_on_again_between_two_streamed_ids(make_model):
    for _ in stream(make_model(), [1, 2], max_new_tokens=2):
        assert torch.is_grad_enabled()
