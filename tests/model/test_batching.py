from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from random_prompts import random_prompts

from grist_model import RopeScaling, generate, generate_many
from grist_model.attention import KVCache

SAMPLED: dict[str, Any] = {"temperature": 1.5, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 4}


@pytest.mark.parametrize(
    ("changes", "most"),
    [({}, 1), ({}, 7), ({}, 200), ({"experts": 0, "window_layers": "all", "window": 3, "sinks": False}, 5)],
    ids=["one by one", "seven", "all at once", "windows everywhere"],
)
def test_greedy_equals_one_by_one(make_model, changes, most):
    model = make_model(**changes)
    prompts = random_prompts(30, longest=30)
    free = [generate(model, prompt, max_new_tokens=16, temperature=0) for prompt in prompts]
    stops = {row[at] for at, row in enumerate(free[:8])}  # rows end at very different lengths
    alone = [generate(model, prompt, max_new_tokens=16, temperature=0, stop_ids=stops) for prompt in prompts]
    assert len(set(map(len, alone))) > 3
    many = list(generate_many(model, prompts, max_new_tokens=16, temperature=0, stop_ids=stops, max_batch=most))
    assert sorted(index for index, _ in many) == list(range(30))
    assert dict(many) == dict(enumerate(alone))


@pytest.mark.parametrize("most", [1, 4, 50])
def test_sampling_does_not_depend_on_the_batch(make_model, most):
    model = make_model()
    prompts = random_prompts(25, longest=20)
    together = generate(model, prompts, max_new_tokens=10, stop_ids=range(8), **SAMPLED)
    many = generate_many(model, prompts, max_new_tokens=10, stop_ids=range(8), max_batch=most, **SAMPLED)
    assert dict(many) == dict(enumerate(together))


def test_rows_are_filled_while_prompts_wait_and_leave_afterwards(make_model):
    model = make_model()
    shapes: list[tuple[int, int]] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    prompts = [[*prompt, 1] for prompt in random_prompts(12, longest=9)]  # two ids or more: T of 1 is a decoding step
    rows = dict(generate_many(model, prompts, max_new_tokens=14, max_batch=4, stop_ids=range(12), seed=0))
    decoding = [batch for batch, time in shapes if time == 1]
    assert sum(decoding) == sum(len(row) - 1 for row in rows.values())  # no row is computed after its end
    assert max(decoding) == 4
    assert decoding == sorted(decoding, reverse=True)  # full as long as anything waits
    assert sum(batch for batch, time in shapes if time > 1) == 12


def test_the_cache_never_reads_beyond_its_longest_row(make_model, monkeypatch):
    begin, calls = KVCache.begin, []

    def checked(cache: KVCache, *call) -> torch.Tensor:
        assert cache.used == int(cache.lengths_B.max())  # counted on the host, so that nobody asks the device
        calls.append(cache.used)
        return begin(cache, *call)

    monkeypatch.setattr(KVCache, "begin", checked)
    prompts = random_prompts(20, longest=40)
    list(generate_many(make_model(), prompts, max_new_tokens=12, max_batch=3, stop_ids=range(8), seed=0))
    assert any(after < before for before, after in pairwise(used for used in calls if used))  # a long row has left


def test_results_come_as_they_finish_and_ids_as_they_are_drawn(make_model):
    model = make_model()
    heard: dict[int, list[int]] = {}
    many = generate_many(
        model, random_prompts(6, longest=9), max_new_tokens=5, max_batch=2, seed=1,
        on_token=lambda index, id_: heard.setdefault(index, []).append(id_),
    )  # fmt: skip
    index, first = next(many)
    assert torch.is_grad_enabled()
    assert index == 0
    assert set(heard) == {0, 1}  # the others have not begun
    assert {index: first, **dict(many)} == heard


def test_one_token_each(make_model):
    model = make_model()
    prompts = random_prompts(9, longest=9)
    expected = generate(model, prompts, max_new_tokens=1, temperature=0)
    many = generate_many(model, prompts, max_new_tokens=1, temperature=0, max_batch=4)
    assert [row for _, row in many] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [1, 2]}, "takes a batch of prompts, but got one"),
        ({"prompts": [[1], []]}, "a prompt of the batch is empty"),
        ({"prompts": [[1], [97]]}, "prompt id 97"),
        ({"prompts": [[1], [1] * 62]}, "a prompt of 62 ids and max_new_tokens=4 exceed"),
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"top_p": 2.0}, "top_p must be in"),
    ],
)
def test_bad_arguments_are_named_before_the_first_result_is_asked_for(make_model, options, message):
    with pytest.raises(ValueError, match=message):
        generate_many(make_model(), **({"prompts": [[1], [2]], "max_new_tokens": 4} | options))


def test_dynamic_rotary_scaling_is_refused(make_model):
    model = make_model(yarn=None, rope_scaling=RopeScaling(kind="dynamic", factor=2.0, original_context=16))
    with pytest.raises(ValueError, match="does not go with"):
        generate_many(model, [[1], [2]], max_new_tokens=4)
