"""Completions and samples: they end where they should, repeat under a seed, and read well."""

from __future__ import annotations

import pytest
from tiny_house import model, tokenizer

from grist_eval.completion import GREEDY, complete, describe, prompt_ids, room_for_prompt
from grist_eval.generation import Example, evaluate_generation
from grist_eval.samples import SETTINGS, draw_samples, format_samples, write_samples
from grist_model.generate import Sampling

PROMPTS = ["The miller", "Water turned the wheel", ""]


@pytest.fixture(scope="module")
def subject():
    of_text = tokenizer()
    return model(of_text.vocab_size), of_text


def test_settings_are_described_by_what_differs():
    assert describe(GREEDY) == "greedy"
    assert describe(Sampling(0.8)) == "temperature 0.8"
    assert describe(Sampling(1.0, top_k=40, min_p=0.1)) == "temperature 1.0, top-k 40, min-p 0.1"
    assert {"greedy", "temperature 0.8"} < {describe(setting) for setting in SETTINGS}


def test_a_prompt_keeps_its_end_and_an_empty_one_starts_a_document():
    of_text = tokenizer()
    ids = of_text.encode("The miller's daughter")
    assert prompt_ids(of_text, "The miller's daughter", 100) == ids
    assert prompt_ids(of_text, "The miller's daughter", 3) == ids[-3:]
    assert prompt_ids(of_text, "", 3) == [of_text.eot_id]


def test_a_begin_of_text_token_stays_in_front_whatever_is_cut():
    of_text = tokenizer()
    ids = of_text.encode("The miller's daughter")
    of_text.bos_id = 7
    assert prompt_ids(of_text, "The miller's daughter", 100) == [7, *ids]
    assert prompt_ids(of_text, "The miller's daughter", 3) == [7, *ids[-2:]]
    assert prompt_ids(of_text, "The miller's daughter", 1) == [7]
    assert prompt_ids(of_text, "", 3) == [7]


def test_nothing_to_start_from_is_told():
    of_text = tokenizer()
    of_text.eot_id = None
    with pytest.raises(ValueError, match="the prompt is empty"):
        prompt_ids(of_text, "", 3)


def test_the_context_must_hold_a_prompt_beside_the_new_tokens(subject):
    assert room_for_prompt(subject[0], 63) == 1
    for new_tokens in (0, 64):
        with pytest.raises(ValueError, match="must be 1 to 63"):
            room_for_prompt(subject[0], new_tokens)


def test_a_completion_stops_before_the_end_of_text(subject):
    network, of_text = subject
    greedy = complete(network, of_text, ["The miller"], GREEDY, max_new_tokens=8, seed=0)[0]
    ids = of_text.encode("The miller") + of_text.encode(greedy)
    third = ids[len(of_text.encode("The miller")) + 2]
    before = of_text.eot_id
    try:
        of_text.eot_id = third  # as if the third token drawn ended the text
        stopped = complete(network, of_text, ["The miller"], GREEDY, max_new_tokens=8, seed=0)[0]
    finally:
        of_text.eot_id = before
    assert greedy.startswith(stopped)
    assert len(of_text.encode(stopped)) <= 2


def test_samples_come_prompt_by_prompt_and_repeat_under_a_seed(subject):
    network, of_text = subject
    first = draw_samples(network, of_text, PROMPTS, max_new_tokens=6, seed=3)
    assert [(sample.prompt, sample.sampling) for sample in first] == [(p, s) for p in PROMPTS for s in SETTINGS]
    assert first == draw_samples(network, of_text, PROMPTS, max_new_tokens=6, seed=3)
    other = draw_samples(network, of_text, PROMPTS, max_new_tokens=6, seed=4)
    greedy = [i for i, sample in enumerate(first) if sample.sampling == GREEDY]
    assert [first[i] for i in greedy] == [other[i] for i in greedy]
    assert first != other


def test_no_prompt_is_refused(subject):
    network, of_text = subject
    with pytest.raises(ValueError, match="no prompts"):
        draw_samples(network, of_text, [], max_new_tokens=4)


def test_samples_are_written_to_be_read(tmp_path, subject):
    network, of_text = subject
    samples = draw_samples(network, of_text, PROMPTS[:2], max_new_tokens=4)
    path = write_samples(samples, tmp_path / "samples.txt", {"model": "tiny"})
    text = path.read_text(encoding="utf-8")
    assert text == format_samples(samples, {"model": "tiny"})
    assert text.startswith("model: tiny\n")
    assert text.count("prompt: ") == 2
    assert text.count("--- greedy\nThe miller") == 1
    for sample in samples:
        assert f"--- {describe(sample.sampling)}\n{sample.prompt}{sample.text}\n" in text
    assert [file.name for file in tmp_path.iterdir()] == ["samples.txt"]


def test_generation_scores_its_own_greedy_text_as_perfect(subject):
    network, of_text = subject
    prompts = ["The miller", "Water turned the", "When the river froze"]
    own = complete(network, of_text, prompts, GREEDY, max_new_tokens=12, seed=0)
    examples = [Example(prompt, [text]) for prompt, text in zip(prompts, own, strict=True) if text.strip()]
    result = evaluate_generation(network, of_text, examples, max_new_tokens=12, batch_size=2)
    assert result["completions"] == [references[0] for _, references in examples]
    assert result["rouge_L"] == pytest.approx(1.0)
    assert result["sampling"] == "greedy"


def test_generation_refuses_an_empty_batch(subject):
    network, of_text = subject
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        evaluate_generation(network, of_text, [Example("a", ["b"])], batch_size=0)
