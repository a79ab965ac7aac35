"""gigatoken as an engine (https://github.com/marcelroed/gigatoken): about ten times as fast as tiktoken."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from grist_data.engine_base import Engine, threads
from grist_data.engine_ranks import Ranks, UnsupportedTokenizer, ranks_of
from grist_data.engine_unicode import CHARACTERS, disputed, holds_any, version_of
from grist_data.patterns import GPT2
from grist_data.tokenizer import Tokenizer, bytes_to_characters

# Version 0.10 remembers every word it has met, for as long as the tokenizer lives.
_RENEWED_AFTER_BYTES = 4 << 30
_LEADING, _CONTINUING = range(0xC2, 0xF5), range(0x80, 0xC0)


def open_gigatoken(tokenizer: Tokenizer) -> Engine:
    """Raises ImportError where gigatoken is missing and UnsupportedTokenizer where it has no ids for a tokenizer."""
    importlib.import_module("gigatoken")  # that it is missing is to be known before the ranks, which take a second
    ranks = ranks_of(tokenizer.definition)
    encoder = _Encoder(ranks)
    return Engine(
        name="gigatoken",
        version=version("gigatoken"),
        unicode_version=unicode_version(),
        reference=tokenizer,
        encode=encoder.encode,
        is_hard=lambda text: holds_disputed(ranks.pattern, text) or ranks.lack(text),
    )


class _Encoder:
    """gigatoken's tokenizer in its own ranks, made anew every few GB of text, and the table from them to ids."""

    def __init__(self, ranks: Ranks) -> None:
        dense, self._ids = ranks.dense()
        merges = sorted(ranks.merge_of.values(), key=lambda merge: ranks.id_of[merge[0] + merge[1]])
        self._json = _definition(dense, merges, ranks.pattern)
        self._renew()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._bytes > _RENEWED_AFTER_BYTES:
            self._renew()
        self._bytes += sum(map(len, texts))  # characters, which is near enough
        # None: as many threads as there are cores, but in a forked process, where its threads would be missing, one.
        found = self._tokenizer.encode_batch([*texts], parallel=None if threads() > 1 else False).layout
        ids = self._ids[np.asarray(found.content.data)]
        ends = np.asarray(found.offsets.data).tolist()
        return [ids[start:end] for start, end in itertools.pairwise(ends)]

    def _renew(self) -> None:
        self._tokenizer, self._bytes = _opened(self._json), 0


def _opened(definition: str) -> Any:
    gigatoken = importlib.import_module("gigatoken")
    try:
        return gigatoken.Tokenizer.from_json(definition)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedTokenizer(f"gigatoken does not open it: {error!r}") from error


def _definition(ranks: Mapping[bytes, int], merges: Sequence[tuple[bytes, bytes]], pattern: str) -> str:
    """A tokenizer.json without special tokens, which would be found in texts."""
    characters = bytes_to_characters()

    def spelled(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    # It knows patterns by their exact spelling, GPT-2's best as the default of ByteLevel.
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": pattern == GPT2}
    steps = [byte_level] if pattern == GPT2 else [split, byte_level]
    vocab = {spelled(token): rank for token, rank in ranks.items()}
    pairs = [[spelled(left), spelled(right)] for left, right in merges]
    model = {"type": "BPE", "vocab": vocab, "merges": pairs, "ignore_merges": True}
    pre_tokenizer = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    return json.dumps({"model": model, "pre_tokenizer": pre_tokenizer, "added_tokens": []})


def holds_disputed(pattern: str, text: str) -> bool:
    """Whether a text holds a character that gigatoken takes differently than the reference."""
    return not text.isascii() and holds_any(text, _disputed(pattern))


def unicode_version() -> str:
    def is_letter(code_point: int) -> bool:
        known, asked = _behaviour(GPT2, "א" + chr(code_point))
        return known == asked

    return version_of(is_letter)


@functools.cache
def _disputed(pattern: str) -> np.ndarray:
    return disputed(_behaviour(pattern, CHARACTERS))


def _behaviour(pattern: str, characters: str) -> np.ndarray:
    """What each character joins in one piece, as bits: a letter, a capital, punctuation or a digit on its left or right.

    The vocabulary has a token for every border of interest, so that the number of tokens tells whether a piece goes over it.
    """
    left = [bytes([ord(ascii_), leading]) for ascii_ in "aA!0" for leading in _LEADING]
    right = [bytes([continuing, ord(ascii_)]) for ascii_ in "aA" for continuing in _CONTINUING]
    borders = left + right
    ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + k for k, token in enumerate(borders)}
    probe = _opened(_definition(ranks, [(token[:1], token[1:]) for token in borders], pattern))
    bits = np.zeros(len(characters), np.uint16)
    # After "Aa" comes what only capitals and letters without case take with them: the small letter ends a piece.
    for number, (before, after) in enumerate([("a", ""), ("A", ""), ("!!", ""), ("0", ""), ("", "a"), ("A", "Aa")]):
        text = before + f"{after}\n{before}".join(characters) + f"{after}\n"
        ids = np.asarray(probe.encode(text))
        # A line is a character; what it has more than its fellows is bytes, not borders.
        n_joined = np.add.reduceat((ids >= 256).astype(np.uint16), np.r_[0, np.flatnonzero(ids == ord("\n"))[:-1] + 1])
        bits |= n_joined << (2 * number)
    return bits
