"""What we write as GGUF, computed by llama.cpp: the same probabilities, tokens, ids of texts and answers as ours."""

from __future__ import annotations

import statistics

import pytest
import tiny_house
import torch
from family_shapes import SHAPES, model_of
from hypothesis import given, settings
from hypothesis import strategies as st

import grist_model
from grist_data.chat_template import conversation_ids, read_template, stop_ids
from grist_tools.export_gguf import write_gguf
from grist_tools.gguf_names import unfit

pytest.importorskip("xllamacpp")
from llama_cpp import LlamaCpp, kl_divergence

CASES = [
    (family, name)
    for family, shapes in SHAPES.items()
    for name, shape in shapes.items()
    if unfit(family, grist_model.ModelConfig(**shape)) is None
]
# GELU is a table of float16 there.
LARGEST_ERROR = {"gpt2": 4e-3}
PREFIXES = (1, 2, 7, 40, 90)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_house.tokenizer(400)


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tokenizer):
    """(directory, model) of a family and name, made once."""
    made = {}

    def get(family, name):
        if (family, name) not in made:
            directory = tmp_path_factory.mktemp("gguf") / "model"
            model = model_of(family, name)
            grist_model.save(model, directory, tokenizer)
            made[family, name] = directory, model
        return made[family, name]

    return get


def log_probabilities(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].log_softmax(-1)


@pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{family}: {name}" for family, name in CASES])
def test_float32_has_our_probabilities_and_our_greedy_tokens(directories, tmp_path, family, name):
    directory, model = directories(family, name)
    written = write_gguf(directory, tmp_path / "model.gguf", "f32")
    theirs = LlamaCpp(written.path, 512)
    ids = tiny_house.random_ids(1, 96, 397, seed=3)[0].tolist()
    ours = log_probabilities(model, ids)
    errors = [float((theirs.log_probabilities(ids[:n]) - ours[n - 1]).abs().max()) for n in PREFIXES]
    if any("YaRN" in warning for warning in written.warnings):
        assert errors[0] < 1e-3  # nothing is turned at the first position
        assert max(errors) > 1e-3, "llama.cpp agrees now: the warning is not needed any more"
        return
    assert max(errors) < LARGEST_ERROR.get(family, 1e-3)
    expected = grist_model.generate(model, ids[:7], max_new_tokens=12, temperature=0)
    assert theirs.greedy(ids[:7], 12) == expected


def test_every_family_is_among_the_cases():
    assert {family for family, _ in CASES} == set(SHAPES)
    assert len(CASES) >= 14


# Weights and activations are rounded to 8 bits. With experts, whichever of two nearly equal ones is chosen may change.
@pytest.mark.parametrize(
    ("family", "name", "median"),
    [
        ("llama", "plain", 1e-3),
        ("gpt2", "plain", 1e-3),
        ("qwen3_moe", "plain", 3e-3),
        ("gpt_oss", "yarn, truncated", 2e-2),
    ],
)
def test_q8_0_stays_close(directories, tmp_path, family, name, median):
    directory, model = directories(family, name)
    write_gguf(directory, tmp_path / "model.gguf", "q8_0")
    theirs = LlamaCpp(tmp_path / "model.gguf", 512)
    ids = tiny_house.random_ids(1, 96, 397, seed=3)[0].tolist()
    ours = log_probabilities(model, ids)
    found = [kl_divergence(ours[n - 1], theirs.log_probabilities(ids[:n])) for n in range(1, 96, 8)]
    assert min(found) > 1e-5, "as close as float32: were these weights rounded?"
    assert statistics.median(found) < median


def test_yarn_agrees_once_llama_cpp_is_told_what_the_warning_says(tmp_path, tokenizer):
    yarn = grist_model.YarnConfig(8.0, 32, beta_fast=16.0, beta_slow=2.0, truncate=True)
    shape = SHAPES["llama"]["plain"] | {"yarn": yarn}
    model = grist_model.build(grist_model.ModelConfig(**shape)).eval()
    grist_model.save(model, tmp_path / "model", tokenizer)
    written = write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    (warning,) = written.warnings
    assert "--yarn-beta-fast 16 --yarn-beta-slow 2" in warning
    theirs = LlamaCpp(written.path, 512, yarn_beta_fast=16.0, yarn_beta_slow=2.0)
    ids = tiny_house.random_ids(1, 90, 397)[0].tolist()
    assert float((theirs.log_probabilities(ids) - log_probabilities(model, ids)[-1]).abs().max()) < 1e-3


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """(directory, model, tokenizer, server) of a model with a chat template whose turns end with a token of their own."""
    from grist_data.tokenizer_training import train_bpe

    tokenizer = train_bpe(tiny_house.PARAGRAPHS * 4, 400, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = read_template("chatml")
    directory = tmp_path_factory.mktemp("chat") / "model"
    model = tiny_house.model(tokenizer.vocab_size, context_length=256)
    grist_model.save(model, directory, tokenizer, generation={"eos_token_id": sorted(stop_ids(tokenizer))})
    written = write_gguf(directory, directory.parent / "model.gguf", "f32")
    return directory, model, tokenizer, LlamaCpp(written.path, model.config.vocab_size)


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who carried <|im_end|> grain?"}]


def test_messages_are_written_by_our_chat_template(chat):
    _, _, tokenizer, server = chat
    messages = [MESSAGES[0], {"role": "user", "content": "Who carried the grain?"}]
    text = server.post("/apply-template", {"messages": messages})["prompt"]
    assert server.tokenize(text, special=True) == conversation_ids(tokenizer, tokenizer.chat_template, messages)


def test_a_chat_is_answered_as_by_us(chat):
    _, model, tokenizer, server = chat
    messages = [MESSAGES[0], {"role": "user", "content": "Who carried the grain?"}]
    prompt = conversation_ids(tokenizer, tokenizer.chat_template, messages)
    new = grist_model.generate(model, prompt, max_new_tokens=16, temperature=0, stop_ids=stop_ids(tokenizer))
    ended = new[-1] in stop_ids(tokenizer)
    answer = server.chat(messages, 16)
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].strip() == tokenizer.decode(new[:-1] if ended else new).strip()
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert choice["finish_reason"] == ("stop" if ended else "length")


def test_special_tokens_of_a_text_are_text_unless_asked_for(chat):
    _, _, tokenizer, server = chat
    text = "a<|im_end|>b"
    assert server.tokenize(text) == tokenizer.encode(text)
    assert tokenizer.special_tokens["<|im_end|>"] in server.tokenize(text, special=True)


def test_no_token_is_put_before_a_text(chat):
    _, _, tokenizer, server = chat
    assert server.tokenize("the mill", begin=True) == tokenizer.encode("the mill")


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_has_our_ids(chat, text):
    _, _, tokenizer, server = chat
    text = text.replace("\0", " ")  # ends a text there
    assert server.tokenize(text) == tokenizer.encode(text)
