"""Ids of tiktoken's vocabularies must be tiktoken's own, for any text."""

from __future__ import annotations

import base64
import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_corpus import corpus_texts

from grist_data import patterns
from grist_data.tiktoken_export import ENCODINGS, from_ranks, from_tiktoken, read_ranks
from grist_data.tokenizer import Tokenizer, bytes_to_characters
from grist_data.tokenizer_training import train_bpe

tiktoken = pytest.importorskip("tiktoken")

# As tiktoken 0.14 spells them (tiktoken_ext/openai_public.py); ours are in another dialect.
GPT2_OF_TIKTOKEN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
PATTERNS = {"gpt2": (patterns.GPT2, GPT2_OF_TIKTOKEN), "o200k": (patterns.O200K, patterns.O200K)}
AWKWARD = [
    "'",
    "'s",
    "'S",
    "'\u017f",
    "don't",
    "I'LL",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u3000",
    "\u0085",
    "a",
    "Z",
    "ß",
]
AWKWARD += [
    "0",
    "12345",
    "½",
    "Ⅷ",
    "!",
    "...",
    "/\n",
    "小",
    "麦粉",
    "🌾",
    "e\u0301",
    "ǅ",
    "ʰ",
    "क्षि",
    "<|endoftext|>",
    "\x00",
]


def ranks_with_gaps() -> dict[bytes, int]:
    """A trained vocabulary, with unused ranks, tokens that merging does not reach, and pieces over several characters."""
    byte_of = {character: byte for byte, character in enumerate(bytes_to_characters())}
    trained = train_bpe([" ".join(corpus_texts(40)) + "".join(AWKWARD) * 3], 600)
    vocab = sorted(trained._engine.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(byte_of[c] for c in token) for token, id_ in vocab if id_]
    ranks = {token: rank + 3 * (rank > 400) for rank, token in enumerate(tokens)}
    for token in (b"unreachable", "小麦".encode(), b" DON'T", b"12345"):
        ranks.setdefault(token, max(ranks.values()) + 2)
    return ranks


RANKS = ranks_with_gaps()
SPECIAL = {"<|endoftext|>": max(RANKS.values()) + 4, "<|end|>": max(RANKS.values()) + 9}


@pytest.fixture(scope="module", params=PATTERNS)
def pair(request):
    ours, theirs = PATTERNS[request.param]
    encoding = tiktoken.Encoding("test", pat_str=theirs, mergeable_ranks=RANKS, special_tokens=SPECIAL)
    return from_ranks(RANKS, SPECIAL, ours), encoding


@settings(max_examples=400, deadline=None)
@given(st.text() | st.lists(st.sampled_from(AWKWARD), max_size=12).map("".join))
def test_ids_are_those_of_tiktoken(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text


def test_every_pair_of_awkward_pieces(pair):
    ours, theirs = pair
    texts = [a + b for a, b in itertools.product(AWKWARD, AWKWARD)]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids.tolist() == theirs.encode_ordinary(text), repr(text)


def test_special_tokens_and_gaps_keep_their_ids(pair, tmp_path):
    ours, theirs = pair
    assert ours.special_tokens == SPECIAL
    assert ours.vocab_size == theirs.n_vocab
    assert ours.eot_id == theirs.eot_token
    assert ours.decode([SPECIAL["<|end|>"]]) == "<|end|>"
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.sha256 == ours.sha256
    text = "".join(AWKWARD)
    assert again.encode(text) == theirs.encode_ordinary(text)


def test_whole_pieces_that_merging_does_not_reach(pair):
    ours, _ = pair
    assert ours.encode("unreachable") == [RANKS[b"unreachable"]]
    assert len(ours.encode("unreachables")) > 1


@pytest.mark.parametrize("pattern", patterns.KNOWN)
def test_ranks_below_those_of_the_parts(pattern):
    """A token may come before what it is made of; tiktoken forms it all the same, as soon as the parts are there."""
    ranks = {bytes([byte]): byte + 10 for byte in range(256)} | {
        b"abc": 0,
        b"ab": 300,
        b"abcd": 1,
        b"dd": 299,
        b"cdd": 2,
    }
    theirs = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ours = from_ranks(ranks, {}, pattern)
    for letters in itertools.product("abcd", repeat=6):
        text = "".join(letters)
        assert ours.encode(text) == theirs.encode_ordinary(text), text


def test_transformers_reads_the_same_ids(pair, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, theirs = pair
    ours.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = " ".join(AWKWARD).replace("<|endoftext|>", "")
    assert loaded(text)["input_ids"] == theirs.encode_ordinary(text)


def test_long_texts_are_cut_without_a_trace(pair):
    ours, theirs = pair
    text = " ".join(AWKWARD + corpus_texts(5)) * 60
    assert len(text) > 140_000
    assert ours.cuts_at_spaces
    assert ours.encode(text) == theirs.encode_ordinary(text)


def test_ranks_file(tmp_path):
    file = tmp_path / "small.tiktoken"
    file.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in RANKS.items()))
    assert read_ranks(file) == RANKS
    tokenizer = from_tiktoken("o200k_harmony", file)
    assert tokenizer.eot_id == 199999
    assert tokenizer.vocab_size == 201088
    assert tokenizer.special_tokens["<|start|>"] == 200006
    assert len(tokenizer.special_tokens) == 201088 - 199998
    assert from_tiktoken("gpt2", file).eot_id == 50256


def test_bad_ranks_are_named(tmp_path):
    file = tmp_path / "bad.tiktoken"
    file.write_bytes(b"YQ== 0\n!!! 1\n")
    with pytest.raises(ValueError, match=r"bad.tiktoken:2: expected 'base64-token rank'"):
        read_ranks(file)
    with pytest.raises(FileNotFoundError, match="no tiktoken ranks at"):
        read_ranks(tmp_path / "absent")
    with pytest.raises(ValueError, match="lack 255 of the 256 single bytes, first 0x00"):
        from_ranks({b"a": 0}, {}, patterns.GPT2)
    with pytest.raises(ValueError, match="unknown tiktoken encoding 'r50k'"):
        from_tiktoken("r50k")


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="the published vocabularies are a download")
@pytest.mark.parametrize("name", ENCODINGS)
def test_published_vocabularies(name):
    theirs, ours = tiktoken.get_encoding(name), from_tiktoken(name)
    assert ours.vocab_size == theirs.n_vocab
    text = " ".join(AWKWARD + corpus_texts(20))
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.special_tokens.items() <= theirs._special_tokens.items()
