"""A tokenizer.json becomes ranks where they mean the same, and is refused, with the reason, where they do not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from text_corpus import corpus_texts

from grist_data.engine_ranks import UnsupportedTokenizer, last_merge, ranks_of
from grist_data.engines import open_engine
from grist_data.patterns import GPT2, LLAMA3
from grist_data.tiktoken_export import from_ranks
from grist_data.tokenizer import Tokenizer
from grist_data.tokenizer_training import train_bpe

BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.fixture
def definition() -> dict:
    return json.loads(train_bpe(corpus_texts(20), 320, ("<|endoftext|>", "<|user|>")).json_bytes)


def test_a_trained_vocabulary_and_its_ranks(definition):
    ranks = ranks_of(definition)
    assert ranks.pattern == GPT2
    assert sorted(ranks.id_of.values()) == [*range(2, 320)], "all but the special tokens"
    assert len(ranks.merge_of) == 320 - 2 - 256
    assert all(left + right == token for token, (left, right) in ranks.merge_of.items())


def test_dense_ranks_keep_the_order_of_ids():
    ranks = ranks_of(from_ranks(BYTES | {b"ab": 400, b"cd": 300, b"abcd": 999}, {}, LLAMA3).definition)
    dense, ids = ranks.dense()
    assert dense == BYTES | {b"cd": 256, b"ab": 257, b"abcd": 258}
    assert ids.dtype == np.uint32
    assert ids.tolist() == [*range(256), 300, 400, 999]


def test_last_merges():
    ranks = BYTES | {b"ab": 256, b"bc": 257, b"abc": 258, b"aab": 259}
    assert last_merge(ranks, b"ab") == (b"a", b"b")
    assert last_merge(ranks, b"abc") == (b"ab", b"c")
    assert last_merge(ranks, b"aab") == (b"a", b"ab")
    assert last_merge(ranks, b"xyz") is None
    assert last_merge(ranks, b"x") is None
    assert last_merge({**ranks, b"abc": 1}, b"abc") == (b"ab", b"c"), "also of a rank below those of its parts"


def test_merges_as_strings_are_read(definition):
    ranks = ranks_of(definition)
    definition["model"]["merges"] = [" ".join(merge) for merge in definition["model"]["merges"]]
    assert ranks_of(definition) == ranks


def test_merges_that_never_happen_are_allowed():
    """Llama 3's file lists every way to cut a token in two."""
    definition = from_ranks(BYTES | {b"ab": 256, b"cd": 257, b"bcd": 258, b"abcd": 259}, {}, LLAMA3).definition
    ranks = ranks_of(definition)
    assert definition["model"]["merges"] == [["a", "b"], ["c", "d"], ["b", "cd"], ["ab", "cd"]]
    definition["model"]["merges"].insert(3, ["a", "bcd"])
    assert ranks_of(definition) == ranks
    tokenizer = Tokenizer(definition)
    for text in ("abcd", "bcdabcd", "abcdab", "aabcdd"):
        assert open_engine(tokenizer, "tiktoken").encode_batch([text])[0].tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("whole_pieces", [False, True])
def test_tokens_without_a_merge_are_whole_pieces_or_nothing(definition, whole_pieces):
    definition["model"]["vocab"] |= {"unreachable": 320, "小": 321}
    definition["model"]["ignore_merges"] = whole_pieces
    assert (b"unreachable" in ranks_of(definition).id_of) == whole_pieces
    tokenizer = Tokenizer(definition)
    assert (tokenizer.encode("unreachable") == [320]) == whole_pieces
    texts = ["unreachable", "unreachables", " unreachable", "小", "mill unreachable"]
    for name in ("tiktoken", "auto"):
        found = open_engine(tokenizer, name).encode_batch(texts)
        assert [ids.tolist() for ids in found] == [tokenizer.encode(text) for text in texts]


def with_split(definition, **changes):
    split = {"type": "Split", "pattern": {"Regex": GPT2}, "behavior": "Isolated", "invert": False} | changes
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}


def swap_merges(definition):
    merges = definition["model"]["merges"]
    merges[10], merges[11] = merges[11], merges[10]


def drop_merge(definition):
    del definition["model"]["merges"][5]


def drop_byte(definition):
    del definition["model"]["vocab"]["Ā"]


REFUSED = {
    r"its model is WordPiece, not BPE": lambda d: d["model"].update(type="WordPiece"),
    r"its model has dropout = 0.1": lambda d: d["model"].update(dropout=0.1),
    r"its model has end_of_word_suffix = '</w>'": lambda d: d["model"].update(end_of_word_suffix="</w>"),
    r"it normalizes text, by {'type': 'NFKC'}": lambda d: d.update(normalizer={"type": "NFKC"}),
    r"its pre-tokenizer is none": lambda d: d.update(pre_tokenizer=None),
    r"its pre-tokenizer is Metaspace": lambda d: d.update(pre_tokenizer={"type": "Metaspace"}),
    r"puts a space before the text": lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
    r"in a form that is not known": lambda d: d["pre_tokenizer"].update(use_regex=False),
    r"a pattern that is not known: \\w\+": lambda d: with_split(d, pattern={"Regex": r"\w+"}),
    r"a pattern that is not known: None": lambda d: with_split(d, pattern={"String": " "}),
    r"with behavior Removed": lambda d: with_split(d, behavior="Removed"),
    r"invert True": lambda d: with_split(d, invert=True),
    r"lacks 1 of the 256 bytes, first 0x00": drop_byte,
    r"its merges are not in the order of ids": swap_merges,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_ranks_cannot_express_is_refused(definition, reason):
    ranks_of(definition)
    REFUSED[reason](definition)
    with pytest.raises(UnsupportedTokenizer, match=reason):
        ranks_of(definition)


def test_a_token_formed_by_another_merge_is_refused():
    tokenizer = from_ranks(BYTES | {b"ab": 256, b"bc": 257, b"abc": 258}, {}, GPT2)
    assert tokenizer.definition["model"]["merges"][-1] == ["ab", "c"]
    tokenizer.definition["model"]["merges"][-1] = ["a", "bc"]
    with pytest.raises(UnsupportedTokenizer, match=r"token 258 \(b'abc'\) has no merge of \(b'ab', b'c'\)"):
        ranks_of(tokenizer.definition)


def test_patterns_written_as_a_split_are_known(definition):
    with_split(definition)
    assert ranks_of(definition).pattern == GPT2
    with_split(definition, pattern={"Regex": LLAMA3})
    assert ranks_of(definition).pattern == LLAMA3


def test_what_ranks_lack(definition):
    assert not any(map(ranks_of(definition).lack, ("e\u0301", "<|user|>", "\U00016ebb")))
    definition["normalizer"] = {"type": "NFC"}
    definition["added_tokens"][1]["special"] = False
    ranks = ranks_of(definition)
    assert all(map(ranks.lack, ("e\u0301", "a <|user|>", "\u212b", "\U0003fffd")))
    assert not any(map(ranks.lack, ("é", "<|endoftext|> <|user >", "", "小麦 \u0301 🌾")))
