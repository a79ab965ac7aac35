"""Every text comes back exactly, special names in a text stay text, and transformers reads the same ids."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from text_corpus import corpus_texts
from tokenizers import models, pre_tokenizers

from grist_data.tokenizer import Tokenizer, bytes_to_characters, pieces_of
from grist_data.tokenizer_training import CONTINUATION, TRAINERS, train_bpe

SPECIAL = ("<|endoftext|>", "<|user|>")
TEXTS = corpus_texts(40)
AWKWARD = [
    "",
    " ",
    "\n\n \t\r\n",
    "<|endoftext|>",
    "a<|endoftext|> <|user|>b",
    f"{CONTINUATION}a a{CONTINUATION} ##a",
    "\x00\x01\ufeff\ufffd",
    "小麦粉 🌾👩‍🌾 e\u0301",
    "x" * 300,
    "don't  DON'T",
]


@pytest.fixture(scope="module", params=TRAINERS)
def tokenizer(request) -> Tokenizer:
    return TRAINERS[request.param](TEXTS, 700, SPECIAL)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_every_string_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes(ids) == text.encode()
    assert not set(ids) & set(tokenizer.special_tokens.values())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL, "<", "|", " ", CONTINUATION, "#", "a", "\n"])).map("".join))
def test_special_names_stay_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == text


def test_special_ids_decode_to_their_names(tokenizer):
    assert tokenizer.decode([tokenizer.eot_id, *tokenizer.encode("grain")]) == "<|endoftext|>grain"
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|user|>": 1}
    assert (tokenizer.eot_id, tokenizer.bos_id) == (0, None)


def test_batches_equal_single_texts(tokenizer):
    batch = tokenizer.encode_batch(AWKWARD)
    assert all(ids.dtype == np.uint32 for ids in batch)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in AWKWARD]
    assert tokenizer.encode_batch([]) == []


def test_token_bytes_add_up_wherever_they_are_cut(tokenizer):
    text = "小麦粉 🌾 naïve"
    ids = tokenizer.encode(text)
    for cut in range(len(ids)):
        assert tokenizer.token_bytes(ids[:cut]) + tokenizer.token_bytes(ids[cut:]) == text.encode()


def test_ids_without_a_token_are_replaced(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == "\ufffd"


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"character 2 of the text is a lone surrogate \('\\ud800'\)"):
        tokenizer.encode("ab\ud800")


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert again.sha256 == tokenizer.sha256
        assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
        assert (again.eot_id, again.vocab_size, again.kind) == (tokenizer.eot_id, tokenizer.vocab_size, tokenizer.kind)
    import hashlib

    assert hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest() == tokenizer.sha256


def test_transformers_reads_the_same_ids(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS[:5], "小麦粉 🌾 naïve\r\n x"]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.eot_id
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_sha256_ignores_spelling_and_truncation(tmp_path):
    tokenizer = train_bpe(TEXTS, 300)
    definition = json.loads(tokenizer.json_bytes)
    definition["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(reversed(definition.items())), indent=3))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.sha256 == tokenizer.sha256
    assert len(loaded.encode(TEXTS[0])) > 4


def test_long_texts_are_encoded_in_pieces_with_the_same_ids(tokenizer):
    """The pieces must be real ones, and must not be noticeable."""
    text = " ".join(TEXTS * 30)
    assert len(text) > 4 * 65_536
    assert len(list(pieces_of(text))) > 3
    assert "".join(pieces_of(text)) == text
    assert tokenizer.cuts_at_spaces
    whole = tokenizer._engine.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == whole


def test_a_text_without_spaces_stays_whole():
    assert list(pieces_of("x" * 400_000)) == ["x" * 400_000]


def test_tokenizers_that_join_over_spaces_are_not_cut(tmp_path):
    engine = tokenizers.Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "</s>": 2}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.add_special_tokens(["</s>"])
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.cuts_at_spaces
    assert tokenizer.eot_id == 2
    with pytest.raises(ValueError, match="byte-level"):
        tokenizer.token_bytes([1])


def test_bytes_to_characters_is_the_published_alphabet():
    assert sorted(bytes_to_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert bytes_to_characters()[ord(" ")] == "Ġ"
    assert bytes_to_characters()[ord("\n")] == "Ċ"


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_gives_the_same_vocabulary_in_another_process(kind):
    """The hash tables inside the trainer are seeded anew in every process."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]; from text_corpus import corpus_texts;"
        "from grist_data.tokenizer_training import TRAINERS;"
        f"print(TRAINERS[{kind!r}](corpus_texts(30), 800).sha256)"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", program, str(here.parent), str(here.parents[1] / "data")]
    others = {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)}
    assert others == {TRAINERS[kind](corpus_texts(30), 800).sha256}


@pytest.mark.parametrize(("kind", "vocab_size"), [("bpe", 270), ("wordpiece", 530)])
def test_a_larger_vocabulary_needs_fewer_tokens(kind, vocab_size):
    small, large = TRAINERS[kind](TEXTS, vocab_size), TRAINERS[kind](TEXTS, vocab_size + 50)
    assert (small.vocab_size, large.vocab_size) == (vocab_size, vocab_size + 50)
    assert len(large.encode(TEXTS[3])) < len(small.encode(TEXTS[3])) < len(TEXTS[3].encode())


@pytest.mark.parametrize(("kind", "vocab_size", "smallest"), [("bpe", 256, 257), ("wordpiece", 512, 513)])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(kind, vocab_size, smallest):
    with pytest.raises(ValueError, match=f"vocab_size must be at least {smallest} .* but got {vocab_size}"):
        TRAINERS[kind](TEXTS, vocab_size)
    assert TRAINERS[kind](TEXTS, smallest).vocab_size == smallest


@pytest.mark.parametrize("name", ["hello", "<a b>", "", "'s", "<||>", "end!"])
def test_special_tokens_that_text_could_produce_are_refused(name):
    with pytest.raises(ValueError, match="could come from plain text"):
        train_bpe(TEXTS, 300, (name,))


def test_repeated_special_tokens_are_refused():
    with pytest.raises(ValueError, match="repeats a name"):
        train_bpe(TEXTS, 300, ("<|a|>", "<|a|>"))


def test_missing_and_malformed_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    broken = tmp_path / "tokenizer.json"
    for content, message in [("{", "not valid JSON"), ("[]", "no 'model' section"), ('{"model": {}}', "not a usable")]:
        broken.write_text(content)
        with pytest.raises(
            ValueError, match=f"tokenizer.json is {message}|tokenizer.json is not a tokenizer.*{message}"
        ):
            Tokenizer.load(tmp_path)


def test_config_that_names_an_unknown_token_is_refused(tmp_path):
    tokenizer = train_bpe(TEXTS, 300, ("<|stop|>",))
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(ValueError, match="names '</s>' as eos_token"):
        Tokenizer.load(tmp_path)
