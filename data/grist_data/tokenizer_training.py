"""Train a byte-level vocabulary on text: BPE, or WordPiece over the same byte alphabet.

Both cover every Unicode string without an unknown token: their alphabet is the 256 bytes. The result depends on the text
only, not on threads or runs.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from grist_data.engine_training import StoredTexts, gigatoken_is_installed, learned_merges
from grist_data.tokenizer import END_OF_TEXT, Tokenizer, bytes_to_characters

# BERT marks the inside of a word by "##", which a text can contain. This character (a tie between letters) is outside
# the byte alphabet, so a piece can never be mistaken for the marked form of another.
CONTINUATION = "\N{CHARACTER TIE}"
# Longest-match search costs the square of a word's length, and WordPiece gives up on words over 100 characters.
_LONGEST_WORD_BYTES = 64
_MIN_FREQUENCY = 2
BPE_TRAINERS = ("auto", "tokenizers", "gigatoken")
# Punctuation, something with a letter or digit, punctuation: no pre-tokenizer here yields such a piece from text.
_SPECIAL_FORM = re.compile(r"[^\w\s](?=.*[^\W_])\S*[^\w\s]")


def train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,), trainer: str = "auto"
) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer; ids: special tokens, the 256 bytes, then merges.

    trainer: the package that learns the merges, one of BPE_TRAINERS. "auto" is gigatoken where it is installed; where its
    merges may not be those of `tokenizers`, these are learned again. So the vocabulary does not depend on the choice, and
    `trained_by` of the tokenizer says what was used.
    A small corpus may hold fewer merges: the vocabulary is then smaller than asked. Raises ValueError for a vocabulary
    that cannot hold the bytes, a special token that plain text could produce or an unknown trainer, and ImportError for
    one that is not installed.
    """
    smallest = len(special_tokens) + 256
    _check(vocab_size, special_tokens, smallest, "the special tokens and 256 bytes")
    if trainer not in BPE_TRAINERS:
        raise ValueError(f"unknown trainer {trainer!r}: expected one of {', '.join(BPE_TRAINERS)}")
    if trainer == "tokenizers" or (trainer == "auto" and not gigatoken_is_installed()):
        return _bpe_by_tokenizers(texts, vocab_size, special_tokens)
    if not gigatoken_is_installed():
        raise ImportError("the trainer gigatoken is not installed: pip install gristmill[fast], or choose 'auto'")
    if not _gigatoken_agrees():
        return _bpe_by_tokenizers(texts, vocab_size, special_tokens)
    with StoredTexts(texts) as stored:
        merges = learned_merges(stored, vocab_size - smallest)
        if merges is not None:
            learned = _bpe_of(merges, special_tokens)
            if _is_frequent(b"".join(merges[-1]), learned, stored):
                return learned
        return _bpe_by_tokenizers(stored.texts(), vocab_size, special_tokens)


def _bpe_by_tokenizers(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
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
    return _finished(engine, special_tokens, f"tokenizers {tokenizers.__version__}")


def _bpe_of(merges: Sequence[tuple[bytes, bytes]], special_tokens: Sequence[str]) -> Tokenizer:
    """The tokenizer that `tokenizers` makes of these merges, with its order of ids."""
    characters = bytes_to_characters()

    def spelled(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    names = [*special_tokens, *sorted(characters), *(spelled(left + right) for left, right in merges)]
    model = models.BPE(
        vocab={name: id_ for id_, name in enumerate(names)},
        merges=[(spelled(left), spelled(right)) for left, right in merges],
    )
    engine = tokenizers.Tokenizer(model)
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return _finished(engine, special_tokens, f"gigatoken {version('gigatoken')}")


def _is_frequent(last: bytes, tokenizer: Tokenizer, stored: StoredTexts) -> bool:
    """Whether the last token that was learned is seen as often as `tokenizers` asks for.

    Frequencies never rise from one merge to the next, so the others are then seen as often.
    """
    id_, seen = tokenizer.vocab_size - 1, 0
    for text in stored.texts(containing=last):
        seen += tokenizer.encode(text).count(id_)
        if seen >= _MIN_FREQUENCY:
            return True
    return False


@functools.cache
def _gigatoken_agrees() -> bool:
    """Whether the release that is installed learns what `tokenizers` does from texts full of ties and overlaps."""
    texts = [
        "aaaa aaaaa aa\n\n\n ababab abab ba",
        "12 112 1212  ---- -- --- 'S it's it'll",
        "né née 小麦粉 小麦\t🌾🌾🌾 ",
    ] * 2
    theirs = _bpe_by_tokenizers(texts, 256 + 60, ())
    try:
        with StoredTexts(texts) as stored:
            merges = learned_merges(stored, theirs.vocab_size - 256)
    except (AttributeError, TypeError, ValueError, RuntimeError):  # of an interface that changed
        return False
    return merges is not None and _bpe_of(merges, ()).json_bytes == theirs.json_bytes


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
    return _finished(engine, special_tokens, f"tokenizers {tokenizers.__version__}")


TRAINERS = {"bpe": train_bpe, "wordpiece": train_wordpiece}


def _finished(engine: tokenizers.Tokenizer, special_tokens: Sequence[str], trained_by: str) -> Tokenizer:
    engine.add_special_tokens([*special_tokens])
    config = {"eos_token": special_tokens[0]} if special_tokens else None
    return Tokenizer(json.loads(engine.to_str()), config, trained_by)


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
