"""Text as it comes: whole characters only, and in the end the same text as decoding at once."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiny_house import tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from grist_data import Tokenizer
from grist_tools.text_stream import text_of, until

BYTE_LEVEL = tokenizer()


@pytest.mark.parametrize("text", ["plain", "naïve crêpe “très”", "🥞🥞", "ends with half: 日本語"])
def test_pieces_are_whole_characters_and_join_to_the_text(text):
    pieces = list(text_of(BYTE_LEVEL, BYTE_LEVEL.encode(text)))
    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_a_character_waits_for_its_last_byte():
    ids = BYTE_LEVEL.encode("🧱")  # not in the training text, so one token a byte
    assert len(ids) == 4
    shown = []
    pieces = text_of(BYTE_LEVEL, (shown.append(id_) or id_ for id_ in ids))
    assert next(pieces) == "🧱"
    assert len(shown) == 4


def test_bytes_that_are_no_text_are_shown_as_replacement_characters():
    ids = BYTE_LEVEL.encode("a🧱")[:-1]
    assert "".join(text_of(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids) == "a\N{REPLACEMENT CHARACTER}"


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=30))
def test_any_ids_join_to_what_decoding_them_at_once_gives(ids):
    assert "".join(text_of(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


def test_a_tokenizer_without_bytes_shows_whole_words():
    engine = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.decoder = decoders.WordPiece()
    words = ["grinding grain grinds the grinder", "grain grinding"]
    engine.train_from_iterator(words, trainers.WordPieceTrainer(vocab_size=30, special_tokens=["[UNK]"]))
    of_words = Tokenizer(json.loads(engine.to_str()))
    ids = of_words.encode("grinder grain grinding")
    pieces = list(text_of(of_words, ids))
    assert len(ids) > 3
    assert pieces == ["grinder ", "grain ", "grinding"]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2), st.integers(1, 4))
def test_what_is_shown_ends_before_the_first_stop(text, stops, step):
    pieces = [text[at : at + step] for at in range(0, len(text), step)]
    shown = list(until(pieces, stops))
    # As it comes, the first stop is the one that is complete first; among those, the one that begins first.
    ends = [
        next((text.find(stop) for stop in stops if text[:end].endswith(stop)), None) for end in range(len(text) + 1)
    ]
    assert all(shown)
    joined = "".join(shown)
    assert text.startswith(joined)
    assert not any(stop in joined for stop in stops)
    assert (joined == text) == all(end is None for end in ends)


def test_what_cannot_become_a_stop_is_shown_at_once():
    taken = []
    pieces = (taken.append(piece) or piece for piece in ["one ", "two ", "<", "en", "d>", "three"])
    shown = until(pieces, ["<end>", "<en>"])
    assert next(shown) == "one "
    assert next(shown) == "two "
    assert taken == ["one ", "two "]
    assert list(shown) == []
    assert taken == ["one ", "two ", "<", "en", "d>"]
