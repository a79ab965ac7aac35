from __future__ import annotations

from typing import Any

import pytest
import torch
from random_prompts import random_prompts
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from grist_model import ModelConfig, RopeScaling, build, generate, stream
from grist_model.speculation import RepeatedText, lookup_ids

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 34}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window_layers": "all", "window": 3, "tied_embeddings": True},
        {"experts": 0, "sinks": False, "positions": "learned", "yarn": None},
    ],
    ids=["gpt_oss", "windows everywhere", "learned positions"],
)
@pytest.mark.parametrize("guesses", [1, 4, 40])
def test_prompt_lookup_gives_the_plain_greedy_ids(make_model, changes, guesses):
    model = make_model(**changes)
    prompts = [*random_prompts(3, longest=30, vocab_size=12), [1, 2, 3] * 10, [5]]
    for prompt in prompts:
        assert generate(model, prompt, prompt_lookup=guesses, **GREEDY) == generate(model, prompt, **GREEDY)


def test_streams_and_batches_of_one_take_prompt_lookup(make_model):
    model, prompt = make_model(), [7, 8, 9] * 5
    plain = generate(model, prompt, **GREEDY)
    assert list(stream(model, prompt, prompt_lookup=4, **GREEDY)) == plain
    assert generate(model, [prompt], prompt_lookup=4, **GREEDY) == [plain]


def test_repeated_text_takes_fewer_forward_passes_and_wrong_guesses_harm_nothing(make_model):
    passes: list[int] = []
    model = make_model()
    model.blocks[0].register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    tried = 0
    for prompt in ([7, 8, 9] * 5, [3, 1, 4, 1, 5, 9, 2, 6]):
        passes.clear()
        generate(model, prompt, prompt_lookup=6, **GREEDY)
        tried += sum(width - 1 for width in passes[1:])
        assert passes[0] == len(prompt)
        assert max(passes[1:]) <= 7
        assert len(passes) < 34
    assert tried > 34  # more was guessed than could be right: some guesses were rejected


@pytest.mark.parametrize("most", [1, 2, 7])
def test_as_many_ids_come_as_were_asked_for(make_model, most):
    assert len(list(lookup_ids(make_model(), [7, 8, 9] * 5, most, 40))) == most


def test_a_stop_id_inside_a_guess_ends_the_text(make_model):
    model = make_model()
    prompt = [7, 8, 9] * 5
    plain = generate(model, prompt, **GREEDY)
    for stop in set(plain):
        expected = plain[: plain.index(stop) + 1]
        assert generate(model, prompt, prompt_lookup=8, stop_ids=[stop], **GREEDY) == expected


def test_gradients_are_on_again_between_two_ids(make_model):
    for _ in stream(make_model(), [1, 2, 1, 2], max_new_tokens=4, temperature=0, prompt_lookup=2):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("ids", "guess"),
    [
        ([1, 2, 3, 9, 8, 1, 2, 3], [9, 8, 1, 2]),  # what followed the trailing three
        ([1, 2, 7, 1, 2, 8, 5, 1, 2], [8, 5, 1, 2]),  # the last match, not the first
        ([4, 2, 3, 5, 6, 2, 3, 7, 4, 2, 3], [5, 6, 2, 3]),  # a longer match before a later one
        ([6, 1, 1], [1, 1, 1, 1]),  # beyond the end of the text the guess repeats itself
        ([1, 2, 1, 2, 1], [2, 1, 2, 1]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_guesses_continue_the_last_occurrence(ids, guess):
    assert RepeatedText(ids).guess(4) == guess
    assert RepeatedText(ids).guess(0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup": 0}, "prompt_lookup must be at least 1"),
        ({"temperature": 1.0}, "pass temperature=0"),
        ({"repetition_penalty": 1.1}, "pass one of the two"),
        ({"ids": [[1], [2]]}, "for one prompt, but got 2"),
    ],
)
def test_what_does_not_go_with_prompt_lookup_is_named(make_model, options, message):
    call: dict[str, Any] = {"ids": [1, 2], "max_new_tokens": 4, "temperature": 0, "prompt_lookup": 3} | options
    with pytest.raises(ValueError, match=message):
        generate(make_model(), **call)


def test_dynamic_rotary_scaling_is_refused(make_model):
    model = make_model(yarn=None, rope_scaling=RopeScaling(kind="dynamic", factor=2.0, original_context=16))
    with pytest.raises(ValueError, match="does not go with"):
        generate(model, [1, 2], max_new_tokens=4, temperature=0, prompt_lookup=3)


def _on_a_rank(rank: int, store: str, state: dict[str, torch.Tensor], config: ModelConfig, results) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = build(config)
    model.load_state_dict(state)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    passes: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    results[rank] = (generate(model, [7, 8, 9] * 5, prompt_lookup=6, **GREEDY), len(passes))
    distributed.destroy_process_group()


def test_a_model_sharded_over_two_ranks_writes_the_same(make_model, tmp_path):
    model = make_model(experts=0)
    plain = generate(model, [7, 8, 9] * 5, **GREEDY)
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        spawn(_on_a_rank, args=(str(tmp_path / "store"), model.state_dict(), model.config, results), nprocs=2)
        for rank in (0, 1):
            text, passes = results[rank]
            assert text == plain
            assert passes < len(plain)
