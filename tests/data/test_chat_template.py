"""What of a conversation is trained: the words of the assistant and the token that ends them, under templates of every kind."""

from __future__ import annotations

import datetime
import json

import chat_templates as templates
import numpy as np
import pytest
import tokenizers
from chat_templates import CONVERSATION, SPECIALS
from text_corpus import corpus_texts

from grist_data import Tokenizer
from grist_data import chat_template as chat_template_module
from grist_data.chat_template import (
    SHIPPED,
    check_specials,
    conversation_ids,
    conversation_tokens,
    encode_conversations,
    find_template,
    layouts_of,
    read_template,
    stop_ids,
)
from grist_data.engines import open_engine
from grist_data.tokenizer_training import train_bpe

FIRST, SECOND = CONVERSATION[2]["content"], CONVERSATION[4]["content"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    of_text = train_bpe(corpus_texts(), 400, SPECIALS)
    of_text.config = {"bos_token": "<s>", "eos_token": "</s>"}
    return of_text


def spoken(tokenizer: Tokenizer, template: str, messages=CONVERSATION, **options) -> list[str]:
    """The trained stretches as text."""
    ids, trained = conversation_tokens(tokenizer, messages, template=template, **options)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained, [0]])))
    return [tokenizer.decode(ids[a:b].tolist()) for a, b in edges.reshape(-1, 2).tolist()]


EXPECTED = {
    "CHATML": [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"],
    "CHATML_MARKED": [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"],
    "LLAMA3": [f"{FIRST}<|eot_id|>", f"{SECOND}<|eot_id|>"],
    "MISTRAL": [f" {FIRST}</s>", f" {SECOND}</s>"],
    # <|end|> after the first answer is not what a model stops with.
    "HARMONY": [f"<|channel|>final<|message|>{FIRST}", f"<|channel|>final<|message|>{SECOND}<|return|>"],
    "THINKING": [f"{FIRST}<|im_end|>", f"<think>\n\n</think>\n\n{SECOND}<|im_end|>"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_answers_are_trained_and_nothing_else(tokenizer, name):
    template = getattr(templates, name)
    assert spoken(tokenizer, template) == EXPECTED[name]
    assert spoken(tokenizer, template, train_on="last") == EXPECTED[name][1:]
    assert spoken(tokenizer, template, answers_from=3) == EXPECTED[name][1:]
    assert spoken(tokenizer, template, answers_from=5) == []
    whole, trained = conversation_tokens(tokenizer, CONVERSATION, template=template, train_on="all")
    assert trained.all()
    assert np.array_equal(whole, conversation_tokens(tokenizer, CONVERSATION, template=template).ids)
    assert whole.dtype == np.int64


@pytest.mark.parametrize("name", [*EXPECTED, "plain", "chatml"])
def test_the_answer_follows_the_ids_that_a_model_is_prompted_with(tokenizer, name, monkeypatch):
    monkeypatch.setattr(chat_template_module, "TRAINING_DATE", datetime.datetime.now())  # one template tells the date
    template = read_template(name) if name in SHIPPED else getattr(templates, name)
    for n, end in ((2, 3), (4, 5)):
        prompt = conversation_ids(tokenizer, template, CONVERSATION[:n])
        ids, trained = conversation_tokens(tokenizer, CONVERSATION[:end], template=template, train_on="last")
        assert ids[: len(prompt)].tolist() == prompt
        assert int(np.argmax(trained)) == len(prompt)


def test_the_shipped_templates(tokenizer):
    assert spoken(tokenizer, read_template("chatml")) == EXPECTED["CHATML"]
    whole = conversation_tokens(tokenizer, CONVERSATION, template=read_template("plain"))
    assert spoken(tokenizer, read_template("plain")) == [f"{FIRST}</s>", f"{SECOND}</s>"]
    assert tokenizer.decode(whole.ids.tolist()) == (
        f"Be brief.\n\n### User:\nWho <|im_end|> grinds?\n\n### Assistant:\n{FIRST}</s>\n### User:\n And \n\n what? \n\n"
        f"### Assistant:\n{SECOND}</s>"
    )
    without_eos = train_bpe(corpus_texts(), 300, ["<|endoftext|>"])
    ids = conversation_tokens(without_eos, CONVERSATION, template=read_template("plain")).ids
    assert ids[-1] == without_eos.eot_id
    with pytest.raises(ValueError, match=r"'chatml' needs the special tokens <\|im_start\|>, <\|im_end\|>"):
        check_specials("chatml", without_eos)
    with pytest.raises(ValueError, match=r"'plain' needs the special tokens <\|endoftext\|>"):
        check_specials("plain", train_bpe(corpus_texts(), 300, []))


def test_what_people_wrote_stays_text(tokenizer):
    end = tokenizer.special_tokens["<|im_end|>"]
    ids = conversation_tokens(tokenizer, CONVERSATION, template=templates.CHATML).ids
    assert np.count_nonzero(ids == end) == 5
    assert "Who <|im_end|> grinds?" in tokenizer.decode(ids.tolist())


def huggingface(tokenizer: Tokenizer, template: str, directory):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    theirs.chat_template = template
    return theirs


def test_transformers_marks_the_same_tokens(tokenizer, tmp_path):
    theirs = huggingface(tokenizer, templates.CHATML_MARKED, tmp_path)
    plain = [dict(message, content=message["content"].replace("<|im_end|>", "it is that")) for message in CONVERSATION]
    expected = theirs.apply_chat_template(plain, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, trained = conversation_tokens(tokenizer, plain, template=templates.CHATML_MARKED)
    assert ids.tolist() == list(expected["input_ids"])
    assert trained.tolist() == [bool(mark) for mark in expected["assistant_masks"]]


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "LLAMA3"])
def test_transformers_gives_the_same_ids(tokenizer, tmp_path, name):
    theirs = huggingface(tokenizer, getattr(templates, name), tmp_path)
    messages = [
        dict(message, content=message["content"].replace("<|im_end|>", "it is that")) for message in CONVERSATION
    ]
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert conversation_tokens(tokenizer, messages, template=getattr(templates, name)).ids.tolist() == list(expected)


def test_a_template_may_trim(tokenizer):
    messages = [{"role": "user", "content": "\n hi \n"}, {"role": "assistant", "content": "  yes \n"}]
    assert spoken(tokenizer, templates.LLAMA3, messages) == ["yes<|eot_id|>"]
    assert spoken(tokenizer, templates.CHATML, messages) == ["  yes \n<|im_end|>"]
    text = tokenizer.decode(conversation_tokens(tokenizer, messages, template=templates.LLAMA3).ids.tolist())
    assert "\n\nhi<|eot_id|>" in text


def test_training_data_do_not_depend_on_the_day(tokenizer):
    text = tokenizer.decode(conversation_tokens(tokenizer, CONVERSATION, template=templates.LLAMA3).ids.tolist())
    assert "Today: 26 Jul 2024<|eot_id|>" in text
    prompt = tokenizer.decode(conversation_ids(tokenizer, templates.LLAMA3, CONVERSATION[:2]))
    assert f"Today: {datetime.datetime.now():%d %b %Y}<|eot_id|>" in prompt


def test_a_token_that_swallows_white_space():
    of_text = train_bpe(corpus_texts(), 330, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    definition = {**of_text.definition}
    definition["added_tokens"] = [dict(token, rstrip=True) for token in definition["added_tokens"]]
    stripping = Tokenizer(definition)
    ids = conversation_tokens(stripping, CONVERSATION[:3], template=templates.CHATML).ids.tolist()
    assert "<|im_end|><|im_start|>user\n" in stripping.decode(ids)


def test_a_tokenizer_that_marks_the_beginning_of_a_text():
    """Llama 2's puts a mark before every text. An answer is no new text, but what goes on from its prompt."""
    of_characters = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: k for k, c in enumerate("▁abcdefghijklmnopqrstuvwxyz:")}, [])
    )
    of_characters.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    of_characters.add_special_tokens(["<|endoftext|>"])
    own = Tokenizer(json.loads(of_characters.to_str()))
    template = (
        "{{ messages[0].content }}:{% if messages | length > 1 %}{{ ' ' + messages[1].content + eos_token }}{% endif %}"
    )
    messages = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "mill"}]
    ids, trained = conversation_tokens(own, messages, template=template)
    assert ids.tolist() == [*own.encode("who: mill"), own.eot_id]
    assert ids[~trained].tolist() == conversation_ids(own, template, messages[:1]) == own.encode("who:")


def test_what_cannot_be_told_apart_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"message 2 is the answer: with the generation prompt .*<think>"):
        conversation_tokens(tokenizer, CONVERSATION, template=templates.OPENS_A_THOUGHT)
    without_end = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    with pytest.raises(ValueError, match="no special token follows it that could tell a model to stop"):
        conversation_tokens(tokenizer, CONVERSATION, template=without_end)
    twice = "{% for m in messages %}{{ m.content + m.content + '</s>' }}{% endfor %}"
    with pytest.raises(ValueError, match="it writes that message 2 times"):
        conversation_tokens(tokenizer, CONVERSATION, template=twice)
    hidden = "{% for m in messages %}{{ '<s>' + (m.content if loop.last else m.role) + '</s>' }}{% endfor %}"
    with pytest.raises(ValueError, match="message 2 is the answer: it writes that message 0 times"):
        conversation_tokens(tokenizer, CONVERSATION, template=hidden)
    # The last answer can be told apart, and a model may be prompted by any of them.
    assert conversation_tokens(tokenizer, CONVERSATION, template=twice, train_on="all").trained.all()
    assert conversation_ids(tokenizer, templates.OPENS_A_THOUGHT, CONVERSATION[:4])


@pytest.mark.parametrize(
    "template", ["{% for x %}", "{{ raise_exception('no') }}", "{{ messages[9].content.x }}", "{{ 1 + '' }}"]
)
def test_a_template_that_fails_is_told(tokenizer, template):
    with pytest.raises(ValueError, match="the model's chat template fails"):
        conversation_tokens(tokenizer, CONVERSATION, template=template)


def test_without_a_template_there_is_nothing(tokenizer):
    with pytest.raises(ValueError, match="the tokenizer has no chat template: give one"):
        conversation_tokens(tokenizer, CONVERSATION)
    with pytest.raises(ValueError, match="train_on must be one of answers, last, all, but is 'some'"):
        conversation_tokens(tokenizer, CONVERSATION, template=templates.CHATML, train_on="some")  # pyright: ignore


@pytest.mark.parametrize("engine", ["tiktoken", "gigatoken"])
def test_an_engine_gives_the_same(tokenizer, engine):
    pytest.importorskip(engine)
    fast = open_engine(tokenizer, engine)
    for name in EXPECTED:
        layouts = layouts_of(tokenizer, getattr(templates, name))
        (found,) = encode_conversations(layouts, [(CONVERSATION, 0)], fast.encode_batch)
        (expected,) = encode_conversations(layouts, [(CONVERSATION, 0)], tokenizer.encode_batch)
        assert np.array_equal(found.ids, expected.ids)
        assert np.array_equal(found.trained, expected.trained)


def test_the_token_that_ends_an_answer_is_a_stop(tokenizer):
    names = {"CHATML": "<|im_end|>", "LLAMA3": "<|eot_id|>", "HARMONY": "<|return|>", "MISTRAL": "</s>"}
    always = {tokenizer.special_tokens[name] for name in ("<|endoftext|>", "</s>")}
    for name, end in names.items():
        own = Tokenizer(tokenizer.definition, tokenizer.config, chat_template=getattr(templates, name))
        assert stop_ids(own) == always | {tokenizer.special_tokens[end]}


def test_a_template_is_kept_beside_the_tokenizer(tokenizer, tmp_path):
    config = {
        "eos_token": "</s>",
        "chat_template": [{"name": "default", "template": "A"}, {"name": "tool", "template": "B"}],
    }
    own = Tokenizer(tokenizer.definition, config)
    assert own.chat_template == "A"
    own.save(tmp_path / "a")
    assert not (tmp_path / "a" / "chat_template.jinja").exists(), "transformers would see that one only"
    assert Tokenizer.load(tmp_path / "a").config["chat_template"] == config["chat_template"]
    Tokenizer(tokenizer.definition, {**config, "chat_template": "A"}).save(tmp_path / "a")
    assert (tmp_path / "a" / "chat_template.jinja").read_text() == "A"
    own.chat_template = "other\n"
    own.save(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    assert again.chat_template == "other\n"
    assert "chat_template" not in again.config
    assert find_template(tmp_path / "b", tokenizer) == "other\n"
    assert find_template(tmp_path, again) == "other\n"
    assert read_template(str(tmp_path / "b")) == "other\n"
    tokenizer.save(tmp_path / "c")
    assert not (tmp_path / "c" / "chat_template.jinja").exists()
    with pytest.raises(ValueError, match="has no chat template"):
        read_template(str(tmp_path / "c"))
    with pytest.raises(FileNotFoundError, match=r"'chatlm' is neither plain, chatml nor a \.jinja file"):
        read_template("chatlm")
