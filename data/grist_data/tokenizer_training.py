"""Train a byte-level vocabulary on text: BPE, or WordPiece over the same byte alphabet.

Both cover every Unicode string without an unknown token: their alphabet is the 256 bytes. The result depends on the text
only, not on threads or runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from grist_data.tokenizer import END_OF_TEXT, Tokenizer, bytes_to_characters

# BERT marks the inside of a word by "##", which a text can contain. This character (a tie between letters) is outside
# the byte alphabet, so a piece can never be mistaken for the marked form of another.
CONTINUATION = "\N{CHARACTER TIE}"
# Longest-match search costs the square of a word's length, and WordPiece gives up on words over 100 characters.
_LONGEST_WORD_BYTES = 64
_MIN_FREQUENCY = 2
# Punctuation, something with a letter or digit, punctuation: no pre-tokenizer here yields such a piece from text.
_SPECIAL_FORM = re.compile(r"[^\w\s](?=.*[^\W_])\S*[^\w\s]")


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer; ids: special tokens, the 256 bytes, then merges.

    A small corpus may hold fewer merges: the vocabulary is then smaller than asked. Raises ValueError for a vocabulary
    that cannot hold the bytes, or a special token that plain text could produce.
    """
    _check(vocab_size, special_tokens, len(special_tokens) + 256, "the special tokens and 256 bytes")
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=[*special_tokens],
        initial_alphabet=bytes_to_characters(),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    return _finished(engine, special_tokens)


def train_wordpiece(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
    """WordPiece (greedy longest match) over GPT-2's byte alphabet; every byte is in the vocabulary in both positions.

    ids: special tokens, 256 bytes inside a word, 256 at its start, then learned pieces. Words are cut after 64 bytes.
    Raises as `train_bpe` does.
    """
    _check(vocab_size, special_tokens, len(special_tokens) + 512, "the special tokens and 256 bytes in two positions")
    inside_a_word = [CONTINUATION + character for character in bytes_to_characters()]
    trained = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Split(tokenizers.Regex(f".{{1,{_LONGEST_WORD_BYTES}}}"), "isolated"),
        ]
    )
    trained.pre_tokenizer = pre_tokenizer
    # Listing the continuing bytes as special fixes their ids. Left to itself the trainer numbers them in the order of a
    # hash table, ties between equally frequent pairs follow the numbers, and every run gives another vocabulary.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=[*special_tokens, *inside_a_word],
        initial_alphabet=bytes_to_characters(),
        continuing_subword_prefix=CONTINUATION,
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    model = models.WordPiece(
        vocab=trained.get_vocab(),
        unk_token="[UNK]",  # not in the vocabulary: needing it would be an error, and every byte has a piece
        max_input_chars_per_word=_LONGEST_WORD_BYTES,
        continuing_subword_prefix=CONTINUATION,
    )
    engine = tokenizers.Tokenizer(model)
    engine.pre_tokenizer = pre_tokenizer
    engine.decoder = decoders.Sequence([decoders.Replace(CONTINUATION, ""), decoders.ByteLevel()])
    return _finished(engine, special_tokens)


TRAINERS = {"bpe": train_bpe, "wordpiece": train_wordpiece}


def _finished(engine: tokenizers.Tokenizer, special_tokens: Sequence[str]) -> Tokenizer:
    engine.add_special_tokens([*special_tokens])
    return Tokenizer(json.loads(engine.to_str()), {"eos_token": special_tokens[0]} if special_tokens else None)


def _check(vocab_size: int, special_tokens: Sequence[str], smallest: int, needed_for: str) -> None:
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} ({needed_for}), but got {vocab_size}")
    if len(set(special_tokens)) != len(special_tokens):
        raise ValueError(f"special_tokens repeats a name: {[*special_tokens]}")
    for name in special_tokens:
        if not _SPECIAL_FORM.fullmatch(name):
            raise ValueError(
                f"special token {name!r} could come from plain text: use the form '<|name|>', beginning and ending with"
                " punctuation, with a letter or digit in between and no space"
            )
