"""Conversations to a dataset: the mask of every document, the same bytes however it is made, the template that goes along."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_corpus import SPECIALS, conversations, write_conversations
from text_corpus import corpus_texts, write_jsonl

from grist_data import Document, Shards, Tokenizer, spread
from grist_data import encode as encode_module
from grist_data.chat_template import conversation_tokens, read_template
from grist_data.conversation import document_of
from grist_data.document_index import DocumentIndex
from grist_data.manifest import read_manifest
from grist_data.prepare import prepare
from grist_data.prepare_config import PrepareConfig
from grist_data.sources import SOURCES
from grist_data.survey import text_hash
from grist_data.tokenizer_training import train_bpe
from grist_data.verify import problems_of


class Killed(BaseException):
    """Not caught by anything, as a signal is not."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("chats")
    found = conversations()
    write_conversations(folder / "a.jsonl", found[:40])
    write_conversations(folder / "b.jsonl", [*found[40:], *found[:5]])
    return {
        "source": "conversations",
        "paths": (str(folder),),
        "chat_template": "chatml",
        "special_tokens": SPECIALS,
        "vocab_size": 320,
        "val_fraction": 0.2,
        "unit_bytes": 1500,
        "shard_tokens": 4000,
        "deduplicate": "exact",
    }


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory) -> Path:
    return prepare(PrepareConfig(out=str(tmp_path_factory.mktemp("one") / "d"), workers=1, **settings))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_every_document_has_its_mask(one):
    assert problems_of(one) == []
    tokenizer = Tokenizer.load(one)
    assert tokenizer.chat_template == read_template("chatml")
    of_hash = {text_hash(document_of(messages, "", "")): messages for messages in conversations()}
    n_trained = {}
    for split in ("train", "val"):
        shards = Shards.open(one, split, verify="full")
        index = DocumentIndex(shards)
        assert shards.has_loss_mask
        for number in range(index.n_docs):
            start, stop = index.span(number)
            messages = of_hash.pop(index.hashes(number, number + 1).tobytes())
            expected = conversation_tokens(tokenizer, messages)
            assert shards.read(start, stop - start).tolist() == [*expected.ids.tolist(), tokenizer.eot_id]
            assert shards.trained(start, stop - start).tolist() == [*expected.trained.tolist(), False]
        n_trained[split] = int(shards.trained(0, shards.n_tokens).sum())
        assert shards.n_trained_tokens == n_trained[split]
    assert not of_hash, "a conversation is missing"
    manifest = read_manifest(one)
    assert manifest["source"]["dropped"]["duplicate"]["documents"] == 5
    sha256 = hashlib.sha256(read_template("chatml").encode()).hexdigest()
    assert manifest["conversations"] == {"chat_template_sha256": sha256, "train_on": "answers"}
    assert manifest["settings"]["chat_template_sha256"] == sha256
    for split, facts in manifest["splits"].items():
        assert facts["trained_tokens"] == n_trained[split] == sum(each["trained_tokens"] for each in facts["shards"])
    contents_bytes = sum(len(m["content"].encode()) for messages in conversations() for m in messages)
    between = sum(2 * (len(messages) - 1) for messages in conversations())
    assert sum(facts["text_bytes"] for facts in manifest["splits"].values()) == contents_bytes + between


def test_processes_and_tasks_make_the_same_bytes(settings, one, tmp_path):
    made = prepare(PrepareConfig(out=str(tmp_path / "two"), workers=2, **settings))
    assert contents(made) == contents(one)
    config = PrepareConfig(out=str(tmp_path / "tasks"), workers=1, **settings)
    for rank in (1, 0):
        spread.survey(config, rank, 2)
    spread.plan(config)
    for rank in (2, 0, 1):
        spread.encode(config, rank, 3)
    spread.finish(config)
    assert contents(tmp_path / "tasks") == contents(one)


def test_an_interrupted_preparation_goes_on(settings, one, tmp_path, monkeypatch):
    config = PrepareConfig(out=str(tmp_path / "d"), workers=1, **settings)
    encode_unit, done = encode_module.encode_unit, []

    def stopping(number, *rest):
        if len(done) == 3:
            raise Killed
        done.append(number)
        encode_unit(number, *rest)

    monkeypatch.setattr(encode_module, "encode_unit", stopping)
    with pytest.raises(Killed):
        prepare(config)
    monkeypatch.undo()
    prepare(config)
    assert contents(tmp_path / "d") == contents(one)


@pytest.mark.parametrize("engine", ["tiktoken", "gigatoken"])
def test_an_engine_makes_the_same_dataset(settings, one, tmp_path, engine):
    pytest.importorskip(engine)
    made = prepare(PrepareConfig(out=str(tmp_path / "d"), engine=engine, **{**settings, "tokenizer": str(one)}))
    assert read_manifest(made)["dataset_id"] == read_manifest(one)["dataset_id"]
    assert read_manifest(made)["encoding"][0]["name"] == engine
    assert read_manifest(made)["encoding"][0]["mismatches"] == 0


def test_what_is_trained_is_a_setting(settings, one, tmp_path):
    own: dict[str, Any] = {**settings, "tokenizer": str(one), "chat_template": None}
    last = prepare(PrepareConfig(out=str(tmp_path / "last"), train_on="last", **own))
    every = prepare(PrepareConfig(out=str(tmp_path / "all"), train_on="all", **own))
    answers, of_last, of_all = (Shards.open(directory) for directory in (one, last, every))
    assert answers.read(0, 3000).tolist() == of_last.read(0, 3000).tolist()
    n = answers.n_tokens
    assert 0 < of_last.n_trained_tokens < answers.n_trained_tokens
    assert not (of_last.trained(0, n) & ~answers.trained(0, n)).any()
    # All but the end-of-text token that was put after every document.
    assert of_all.n_trained_tokens == n - of_all.n_docs
    assert len({answers.dataset_id, of_last.dataset_id, of_all.dataset_id}) == 3
    with pytest.raises(ValueError, match="train_on was 'last', now None"):
        prepare(PrepareConfig(out=str(tmp_path / "last"), **own))


def test_another_template_is_another_dataset(settings, one, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(read_template("chatml") + "{# mine #}")
    own: dict[str, Any] = {**settings, "chat_template": str(file)}
    with pytest.raises(ValueError, match="chat_template_sha256 was"):
        prepare(PrepareConfig(out=str(one), **own))
    file.write_text(read_template("chatml"))
    assert prepare(PrepareConfig(out=str(one), **own)) == one


def test_a_template_that_ends_with_the_end_of_text_is_not_ended_twice(settings, tmp_path):
    own: dict[str, Any] = {**settings, "chat_template": "plain", "special_tokens": ("<|endoftext|>",)}
    shards = Shards.open(prepare(PrepareConfig(out=str(tmp_path / "d"), **own)))
    ends = DocumentIndex(shards).ends(0, shards.n_docs)
    tokens, trained = shards.read(0, shards.n_tokens), shards.trained(0, shards.n_tokens)
    assert (tokens[ends - 1] == shards.eot_id).all()
    assert trained[ends - 1].all()
    assert (tokens[ends - 2] != shards.eot_id).all()


def test_the_template_of_the_tokenizer_is_the_default(settings, tmp_path):
    tokenizer = train_bpe(corpus_texts(), 330, SPECIALS)
    tokenizer.save(tmp_path / "none")
    own: dict[str, Any] = {**settings, "chat_template": None}
    with pytest.raises(ValueError, match=r"needs a chat template, and tokenizer '.*none' has none: give chat_template"):
        prepare(PrepareConfig(out=str(tmp_path / "d"), **{**own, "tokenizer": str(tmp_path / "none")}))
    with pytest.raises(ValueError, match="needs a chat template, and tokenizer 'bpe' has none"):
        prepare(PrepareConfig(out=str(tmp_path / "d"), **own))
    tokenizer.config["chat_template"] = [{"name": "default", "template": read_template("chatml")}]
    tokenizer.save(tmp_path / "one")
    assert not (tmp_path / "one" / "chat_template.jinja").exists()
    made = prepare(PrepareConfig(out=str(tmp_path / "d"), **{**own, "tokenizer": str(tmp_path / "one")}))
    assert (made / "chat_template.jinja").read_text() == read_template("chatml")
    assert problems_of(made) == []
    again = Tokenizer.load(made)
    again.save(tmp_path / "model")
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == read_template("chatml")


def test_special_tokens_of_a_template_must_be_the_tokenizers(settings, tmp_path):
    with pytest.raises(ValueError, match=r"'chatml' writes <\|im_start\|>, <\|im_end\|>: add them to special_tokens"):
        PrepareConfig(out="d", **{**settings, "special_tokens": ("<|endoftext|>",)})
    train_bpe(corpus_texts(), 330, ["<|endoftext|>"]).save(tmp_path / "t")
    with pytest.raises(ValueError, match=r"'chatml' needs the special tokens <\|im_start\|>"):
        prepare(PrepareConfig(out=str(tmp_path / "d"), **{**settings, "tokenizer": str(tmp_path / "t")}))


def test_options_of_conversations_belong_to_them():
    given: list[dict[str, Any]] = [{"chat_template": "plain"}, {"train_on": "last"}]
    for options in given:
        with pytest.raises(ValueError, match="chat_template and train_on are for sources of conversations"):
            PrepareConfig(source="shakespeare", **options)
    settings = PrepareConfig(source="shakespeare").settings()
    assert {"chat_template", "train_on", "max_turns", "max_chars", "chat_template_sha256"} & set(settings) == set()


def test_a_conversation_that_the_template_refuses_is_named(settings, tmp_path):
    file = tmp_path / "alternate.jinja"
    file.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{{ m.content + '<|im_end|>' }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"a\.jsonl:\d+: the model's chat template fails: no system message"):
        prepare(PrepareConfig(out=str(tmp_path / "d"), **{**settings, "chat_template": str(file)}))


def test_plain_text_among_conversations_is_refused(settings, tmp_path, monkeypatch):
    def mixed(paths):
        yield document_of(conversations(1)[0], "first", "conversations")
        yield Document("text", "second", "conversations")

    monkeypatch.setitem(SOURCES, "conversations", mixed)
    with pytest.raises(ValueError, match="document second is plain text, but its source should give a conversation"):
        prepare(PrepareConfig(out=str(tmp_path / "d"), workers=1, **{**settings, "val_fraction": 0.0}))
    monkeypatch.setitem(SOURCES, "files", lambda paths: iter([document_of(conversations(1)[0], "first", "files")]))
    with pytest.raises(ValueError, match="document first is a conversation, but its source should give plain text"):
        prepare(
            PrepareConfig(
                source="files", paths=("x",), out=str(tmp_path / "e"), workers=1, vocab_size=300, val_fraction=0
            )
        )


def test_cleaning_judges_what_people_wrote(settings, tmp_path):
    short = [[{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]]
    file = write_conversations(tmp_path / "a.jsonl", short + conversations(10))
    config = {"paths": [str(file)], "clean": {"min_chars": 10}, "out": str(tmp_path / "d")}
    prepare(PrepareConfig.from_values({**json.loads(json.dumps(settings)), **config}))
    assert read_manifest(tmp_path / "d")["source"]["dropped"]["too_short"]["documents"] == 1


def test_plain_datasets_are_as_they_were(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", corpus_texts(30))
    made = prepare(PrepareConfig(source="files", paths=(str(file),), out=str(tmp_path / "d"), vocab_size=300))
    shards = Shards.open(made)
    assert not shards.has_loss_mask
    assert shards.n_trained_tokens == shards.n_tokens
    assert shards.trained(3, 5).tolist() == [True] * 5
    assert not (made / "chat_template.jinja").exists()
    assert "conversations" not in read_manifest(made)
    assert "trained_tokens" not in read_manifest(made)["splits"]["train"]
    assert shards.shards[0].header.sections["loss_mask"][1] == 0
    np.testing.assert_array_equal(shards.trained(0, shards.n_tokens), np.ones(shards.n_tokens, bool))
