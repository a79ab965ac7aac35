"""Conversations: held-out loss is that of the answers' tokens, and samples answer."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_house import model, tokenizer

from grist_data import Shards
from grist_data.chat_template import conversation_ids, conversation_tokens, read_template
from grist_data.prepare import PrepareConfig, prepare
from grist_eval.bits_per_byte import bits_per_byte, together
from grist_eval.completion import GREEDY, chat_ids, complete
from grist_eval.samples import draw_samples, format_samples
from grist_eval.tasks.bits_per_byte import TASK
from grist_model import generate

T = 64


def _talk(n: int) -> list[dict[str, str]]:
    asked = {"role": "user", "content": f"Who turned the stone {n} times?"}
    return [asked, {"role": "assistant", "content": "The wheel " * (1 + n % 3)}]


@pytest.fixture(scope="module")
def subject():
    of_text = tokenizer()
    of_text.chat_template = read_template("plain")
    return model(of_text.vocab_size), of_text


@pytest.fixture(scope="module")
def shards(tmp_path_factory, subject):
    """A split of conversations with a loss mask."""
    folder = tmp_path_factory.mktemp("answers")
    subject[1].save(folder / "tokenizer")
    chats = folder / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": _talk(n)}) + "\n" for n in range(12)))
    settings = PrepareConfig(
        source="conversations", paths=(str(chats),), tokenizer=str(folder / "tokenizer"), out=str(folder / "dataset"),
        val_fraction=0.0, workers=1,
    )  # fmt: skip
    return Shards.open(prepare(settings), "train")


def test_the_loss_is_that_of_the_tokens_of_answers(shards, subject):
    network, of_text = subject
    found = bits_per_byte(network, shards, sequence_length=T, documents=True)
    nats, n = 0.0, 0
    for k in range(12):
        ids, trained = conversation_tokens(of_text, _talk(k))
        assert len(ids) < T
        logits = network(torch.tensor(ids)[None])[0].log_softmax(-1).detach()
        nats -= float(sum(logits[i - 1, ids[i]] for i in range(1, len(ids)) if trained[i]))
        n += int(trained.sum())
    assert found.keys() == {"loss", "perplexity", "tokens"}
    assert found["tokens"] == n
    # Windows cut the stream, not conversations: a few tokens are predicted from fewer before them.
    assert found["loss"] == pytest.approx(nats / n, rel=0.05)
    whole = bits_per_byte(model(320, context_length=2048), shards, sequence_length=shards.n_tokens, documents=True)
    assert whole["loss"] == pytest.approx(nats / n, rel=1e-5)


def test_the_table_has_no_bits_per_byte_for_them(shards, subject):
    rows = dict(TASK.rows(bits_per_byte(subject[0], shards, sequence_length=T)))
    assert list(rows) == ["perplexity per token", "loss per token (nats)", "tokens"]


def test_answers_and_text_together_have_a_loss_only(shards, subject):
    answers = bits_per_byte(subject[0], shards, sequence_length=T)
    text = {"loss": 2.0, "perplexity": 7.4, "tokens": 100, "bytes": 300, "bits_per_byte": 1.0}
    both = together([answers, text])
    assert both.keys() == {"loss", "perplexity", "tokens"}
    assert both["loss"] == pytest.approx(
        (answers["loss"] * answers["tokens"] + 200) / (answers["tokens"] + 100)
    )  # fmt: skip
    assert "bits_per_byte" in together([text, text])


def test_a_look_that_sees_no_answer_is_refused(shards, subject):
    with pytest.raises(ValueError, match="no scored token is trained: score more of it"):
        bits_per_byte(subject[0], shards, sequence_length=T, max_tokens=3)


def test_prompts_are_a_users_messages(subject):
    network, of_text = subject
    prompt = "Who turned the stone?"
    ids = chat_ids(of_text, prompt, 60)
    assert ids == conversation_ids(of_text, of_text.chat_template, [{"role": "user", "content": prompt}])
    assert ids != of_text.encode(prompt)
    chat, plain = (
        complete(network, of_text, [prompt], GREEDY, max_new_tokens=8, seed=0, chat=x) for x in (True, False)
    )
    assert chat != plain
    samples = draw_samples(network, of_text, [prompt], settings=[GREEDY], max_new_tokens=8, chat=True)
    assert f"--- greedy\n{chat[0]}" in format_samples(samples)


def test_an_answer_ends_where_the_turn_does(subject):
    network, of_text = subject
    first = generate(network, chat_ids(of_text, "Who?", 60), max_new_tokens=1, temperature=0.0)[0]
    assert isinstance(first, int)
    of_text.eot_id, before = first, of_text.eot_id
    try:
        assert complete(network, of_text, ["Who?"], GREEDY, max_new_tokens=8, seed=0, chat=True) == [""]
    finally:
        of_text.eot_id = before


def test_messages_that_do_not_fit_are_refused(subject):
    with pytest.raises(ValueError, match="tokens with its template, but there is room for 5"):
        chat_ids(subject[1], "Who turned the stone?", 5)
    with pytest.raises(ValueError, match="no chat template"):
        chat_ids(tokenizer(), "Who?", 60)
