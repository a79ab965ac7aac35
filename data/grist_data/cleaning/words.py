"""Words of a text, and hashes of them that are the same in every process."""

from __future__ import annotations

import re

import numpy as np
import xxhash

# Scripts that put no space between words: Thai and Lao, Tibetan, Myanmar, Khmer, kana, Han. (Korean has spaces.)
_SPACELESS = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_SPACELESS_RUN = re.compile(f"[{_SPACELESS}]+")
_TOKEN = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")
_ASCII_TOKEN = re.compile(r"\w+")
_SPACELESS_SHARE = 0.2
# A word is hashed once, as long as it is remembered. Longer ones (addresses, base64) hardly come back.
_REMEMBERED_WORDS = 1 << 18
_REMEMBERED_CHARS = 32


def is_spaceless(text: str) -> bool:
    """Whether a fifth or more of the visible characters belong to a script that has no spaces between words.

    What `str.split` gives is not words there, and rules about words must not be applied.
    """
    if text.isascii():
        return False
    spaceless = sum(map(len, _SPACELESS_RUN.findall(text)))
    return spaceless > 0 and spaceless >= _SPACELESS_SHARE * sum(map(len, text.split()))


def tokens(text: str) -> list[str]:
    """Words in lower case without punctuation; in scripts without spaces, single characters."""
    pattern = _ASCII_TOKEN if text.isascii() else _TOKEN
    return pattern.findall(text.lower())


class WordHashes(dict[str, int]):
    """word -> xxh3_64 of its UTF-8 bytes, computed when first asked for.

    Python's own `hash` differs from process to process.
    """

    def __missing__(self, word: str) -> int:
        value = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        if len(word) <= _REMEMBERED_CHARS:
            if len(self) >= _REMEMBERED_WORDS:
                self.clear()
            self[word] = value
        return value

    def of(self, words: list[str]) -> np.ndarray:
        """(n,) uint64"""
        return np.fromiter(map(self.__getitem__, words), np.uint64, len(words))
