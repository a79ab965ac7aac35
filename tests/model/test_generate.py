from __future__ import annotations

from typing import Any

import pytest
import torch
from random_prompts import random_prompts

from grist_model import generate, stream
from grist_model.attention import KVCache
from grist_model.sampling import row_seed


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
        torch.testing.assert_close(piece[:, 0], whole[:, end], rtol=1e-5, atol=3e-5)
    with pytest.raises(ValueError, match="24 slots, 24 of them used: no room for 1 more"):
        model(ids[:, :1], cache=cache)


def test_last_asks_for_the_logits_of_several_tokens(make_model, ids):
    model = make_model().double()
    cache = KVCache(model.config, batch=3, slots=24)
    with torch.no_grad():
        whole = model(ids)
        torch.testing.assert_close(model(ids, last=5), whole[:, -5:])
        torch.testing.assert_close(model(ids[:, :9], cache=cache, last=9), whole[:, :9])
        torch.testing.assert_close(model(ids[:, 9:], cache=cache, last=3), whole[:, -3:])


def test_arguments_of_a_cached_call_must_fit(make_model, ids):
    model = make_model()
    with pytest.raises(ValueError, match="pass a cache"):
        model(ids, lengths_B=torch.tensor([1, 2, 3]))
    cache = KVCache(model.config, batch=3, slots=30)
    with pytest.raises(ValueError, match="keeps its own positions"):
        model(ids, cache=cache, positions_BT=ids)
    for last in (0, 25):
        with pytest.raises(ValueError, match=f"last must be between 1 and the 24 tokens of the call, but is {last}"):
            model(ids, cache=cache, last=last)
    with pytest.raises(ValueError, match="leave out last, which is 2"):
        model(ids, cache=cache, lengths_B=torch.tensor([1, 2, 3]), last=2)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be a finite number above 0"),
        ({"stop_strings": ["x"]}, "stop_strings need token_bytes"),
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


def test_a_hundred_prompts_in_a_batch_give_what_each_gives_alone(make_model):
    model = make_model()
    prompts = random_prompts(100, longest=30)
    alone = [generate(model, prompt, max_new_tokens=6, temperature=0) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=6, temperature=0) == alone
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.5, "top_p": 0.95, "repetition_penalty": 1.3}
    drawn = [generate(model, prompt, seed=row_seed(4, row), **options) for row, prompt in enumerate(prompts)]
    assert generate(model, prompts, seed=4, **options) == drawn


def test_equal_prompts_of_a_batch_draw_different_numbers(make_model):
    rows = generate(make_model(), [[1, 2, 3]] * 8, max_new_tokens=12, temperature=2.0, seed=0)
    assert len(set(map(tuple, rows))) == 8
    assert rows[0] == generate(make_model(), [1, 2, 3], max_new_tokens=12, temperature=2.0, seed=0)


def test_a_harsh_repetition_penalty_repeats_nothing(make_model, ids):
    # Logits of both signs, so that the best id not seen yet is above every penalized one.
    model, prompt = make_model(), ids[0, :9].tolist()
    free = generate(model, prompt, max_new_tokens=30, temperature=0)
    penalized = generate(model, prompt, max_new_tokens=30, temperature=0, repetition_penalty=1e6)
    assert len(set(free)) < 30
    assert len({*prompt, *penalized}) == len(set(prompt)) + 30
    assert list(stream(model, prompt, max_new_tokens=30, temperature=0, repetition_penalty=1e6)) == penalized


def test_stop_strings_end_each_row_with_the_id_that_completes_one(make_model, ids):
    model = make_model()
    prompts = [row.tolist() for row in ids[:, :9]]
    spelling = [f"<{id_}>é".encode() for id_ in range(97)]

    def token_bytes(row: list[int]) -> bytes:
        return b"".join(spelling[id_] for id_ in row)

    free = generate(model, prompts, max_new_tokens=20, temperature=0)
    stop = f"{free[0][3]}>é<{str(free[0][4])[0]}"  # ends inside the fifth token
    options: dict[str, Any] = {
        "max_new_tokens": 20,
        "temperature": 0,
        "stop_strings": ["nowhere", stop],
        "token_bytes": token_bytes,
    }
    for row, full in zip(generate(model, prompts, **options), free, strict=True):
        texts = [token_bytes(full[:end]).decode() for end in range(1, 21)]
        end = next((end for end, text in enumerate(texts, start=1) if stop in text), 20)
        assert row == full[:end]
        assert end == 5 or full is not free[0]
    assert list(stream(model, prompts[0], **options)) == free[0][:5]
    assert list(stream(model, prompts[0], prompt_lookup=4, **options)) == free[0][:5]


def test_on_token_hears_every_id_of_the_result_as_it_is_drawn(make_model, ids):
    heard: list[tuple[int, int]] = []
    model = make_model()
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 0}
    free = generate(model, ids[:2, :9], **options)
    stop = next(id_ for id_ in free[0] if id_ not in free[1])
    rows = generate(model, ids[:2, :9], stop_ids=[stop], on_token=lambda *pair: heard.append(pair), **options)
    together = free[0].index(stop) + 1
    assert heard[: 2 * together] == [(row, free[row][step]) for step in range(together) for row in (0, 1)]
    assert heard[2 * together :] == [(1, id_) for id_ in free[1][together:]]
    assert rows == [free[0][:together], free[1]]
