"""gigatoken learns the merges of `tokenizers`, byte for byte; where that is not certain, `tokenizers` learns them."""

from __future__ import annotations

import importlib.util
import os
import random
import signal

import pytest
from text_corpus import corpus_texts

from grist_data.engine_training import StoredTexts
from grist_data.tokenizer_training import train_bpe

needs_gigatoken = pytest.mark.skipif(importlib.util.find_spec("gigatoken") is None, reason="gigatoken is not installed")
SPECIAL = ("<|endoftext|>", "<|user|>")
PIECES = "a b aa bbb -- ==== 1 12 é 小麦 🌾 the miller 's 'S don't ! ?! \u3000 <|endoftext|> \x00 ß א".split(" ")


def awkward_texts(seed: int) -> list[str]:
    """Runs that overlap with themselves, ties, special names, empty texts, all kinds of white space."""
    draw = random.Random(seed)
    ends = ["", " ", "  ", "\n", "\r\n\r\n", "\t", "   \n"]
    return ["".join(draw.choice(PIECES) + draw.choice(ends) for _ in range(draw.randrange(200))) for _ in range(40)]


@needs_gigatoken
@pytest.mark.parametrize("seed", range(6))
def test_merges_are_identical(seed, capfd):
    texts = [*awkward_texts(seed), "", " "]
    ours = train_bpe(texts, 340, SPECIAL, trainer="gigatoken")
    assert ours.trained_by is not None
    assert ours.trained_by.startswith("gigatoken 0.")
    theirs = train_bpe(texts, 340, SPECIAL, trainer="tokenizers")
    assert theirs.trained_by is not None
    assert theirs.trained_by.startswith("tokenizers 0.")
    assert ours.json_bytes == theirs.json_bytes
    assert ours.config == theirs.config
    assert capfd.readouterr() == ("", ""), "what it prints is kept from the terminal"


@needs_gigatoken
@pytest.mark.parametrize("special_tokens", [(), ("<|z|>",), ("<|c|>", "<|b|>", "<|a|>")])
def test_special_tokens_do_not_change_the_merges(special_tokens):
    texts = corpus_texts(60)
    ours, theirs = (train_bpe(texts, 320, special_tokens, trainer=name) for name in ("gigatoken", "tokenizers"))
    assert ours.trained_by != theirs.trained_by
    assert ours.json_bytes == theirs.json_bytes


@needs_gigatoken
@pytest.mark.parametrize(
    ("texts", "vocab_size"),
    [
        (corpus_texts(5), 2000),  # merges of pairs that are seen once
        ([], 300),
        (["", "a"], 300),
        ([*corpus_texts(60), "\U00016ebb\U00016ebc \U00016ebb\U00016ebc"], 320),  # a letter of Unicode 17
        (corpus_texts(60), 258),  # no merges
    ],
)
def test_the_reference_learns_what_gigatoken_may_not(texts, vocab_size):
    ours, theirs = (train_bpe(iter(texts), vocab_size, SPECIAL, trainer=name) for name in ("gigatoken", "tokenizers"))
    assert ours.trained_by == theirs.trained_by
    assert ours.json_bytes == theirs.json_bytes


@needs_gigatoken
def test_the_last_merge_of_frequent_pairs():
    """Every size up to the last that two occurrences allow comes from gigatoken, the next from the reference."""
    texts = corpus_texts(5)
    most = train_bpe(texts, 2000, SPECIAL, trainer="tokenizers").vocab_size
    assert str(train_bpe(texts, most, SPECIAL).trained_by).startswith("gigatoken")
    assert str(train_bpe(texts, most + 1, SPECIAL).trained_by).startswith("tokenizers")
    assert train_bpe(texts, most, SPECIAL).json_bytes == train_bpe(texts, most + 1, SPECIAL).json_bytes


def test_without_gigatoken(monkeypatch):
    monkeypatch.setattr("grist_data.tokenizer_training.gigatoken_is_installed", lambda: False)
    assert str(train_bpe(corpus_texts(5), 300).trained_by).startswith("tokenizers")
    with pytest.raises(ImportError, match=r"the trainer gigatoken is not installed: pip install gristmill\[fast\]"):
        train_bpe(corpus_texts(5), 300, trainer="gigatoken")


def test_unknown_trainers_are_refused():
    with pytest.raises(ValueError, match="unknown trainer 'fast': expected one of auto, tokenizers, gigatoken"):
        train_bpe(corpus_texts(5), 300, trainer="fast")


def test_spooled_texts_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("grist_data.engine_gigatoken.holds_disputed", lambda pattern, text: text == "x")
    texts = ["", "grain", "", "\x00 mill\n", "小麦 grain", ""]
    with StoredTexts(texts) as stored:
        assert [*stored.texts()] == texts
        assert [*stored.texts(containing=b"grain")] == ["grain", "小麦 grain"]
        assert [*stored.texts(containing="麦".encode())] == ["小麦 grain"]
        assert [*stored.texts(containing=b"flour")] == []
        assert not stored.is_hard
    assert [*tmp_path.iterdir()] == []
    with StoredTexts([]) as stored:
        assert [*stored.texts()] == []
    with StoredTexts(["a", "x"]) as stored:
        assert stored.is_hard

    def failing():
        yield "a"
        raise RuntimeError("source")

    with pytest.raises(RuntimeError, match="source"):
        StoredTexts(failing())
    assert [*tmp_path.iterdir()] == []


@needs_gigatoken
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_wait_for_threads_it_does_not_have(tmp_path):
    """gigatoken's threads stay in the process that started them; a child that asked for them would never end."""
    texts = [f"grain mill water stone turns carries river bread {k % 7}" for k in range(200)]
    want = train_bpe(texts, 290).json_bytes
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that waits, with another status
        try:
            (tmp_path / "child").write_bytes(train_bpe(texts, 290).json_bytes)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "child").read_bytes() == want
