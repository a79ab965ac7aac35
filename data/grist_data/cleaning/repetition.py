"""Repetition within a document: Rae et al. 2021, arXiv:2112.11446, appendix A1.1, "Repetition Removal", and Table A1.

Paragraphs are divided by blank lines; lines are those with a visible character; words are what stands between white
space. Characters are counted without the white space around these. What came before in the document is a duplicate, so
the first occurrence is none. A character in several overlapping sequences counts once. In text without spaces between
words only the rules about paragraphs and lines apply.
"""

from __future__ import annotations

import re

import numpy as np

from grist_data.cleaning.settings import CleanConfig
from grist_data.cleaning.words import WordHashes

_BLANK_LINES = re.compile(r"\n\s*\n")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd; any would do, the words' hashes are random already
_FIRST_DUPLICATE = 5  # words; shorter sequences are judged by the most frequent one


def repetition_reason(
    text: str, words: list[str], spaceless: bool, config: CleanConfig, hashes: WordHashes
) -> str | None:
    """The first rule that the text breaks. words: `text.split()`."""
    paragraphs = _visible(_BLANK_LINES.split(text))
    count_share, chars_share = _duplicate_shares(paragraphs)
    if count_share > config.max_duplicate_paragraphs:
        return "duplicate_paragraphs"
    if chars_share > config.max_duplicate_paragraph_chars:
        return "duplicate_paragraph_chars"
    count_share, chars_share = _duplicate_shares(_visible(text.splitlines()))
    if count_share > config.max_duplicate_lines:
        return "duplicate_lines"
    if chars_share > config.max_duplicate_line_chars:
        return "duplicate_line_chars"
    return None if spaceless else _ngram_reason(words, config, hashes)


def _visible(parts: list[str]) -> list[str]:
    return [part for part in map(str.strip, parts) if part]


def _duplicate_shares(parts: list[str]) -> tuple[float, float]:
    """Share of the parts that came before, and share of the characters in these."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0.0, 0.0
    chars = sum(map(len, parts))
    return (len(parts) - len(distinct)) / len(parts), (chars - sum(map(len, distinct))) / chars


def _ngram_reason(words: list[str], config: CleanConfig, hashes: WordHashes) -> str | None:
    """Legend: N words, P places where a sequence begins that may occur again, G those where one begins that does."""
    hashes_N = hashes.of(words)
    lengths_N = np.fromiter(map(len, words), np.int64, len(words))
    n_chars = int(lengths_N.sum())
    limits = (*config.max_top_ngram_chars, *config.max_duplicate_ngram_chars)
    starts_P, keys_P = np.arange(len(words)), hashes_N
    for n, limit in enumerate(limits, start=2):
        inside_P = starts_P <= len(words) - n
        starts_P = starts_P[inside_P]
        keys_P = keys_P[inside_P] * _FACTOR + hashes_N[starts_P + n - 1]
        indices_G, is_first_G = _groups(keys_P)
        if not len(indices_G):
            return None
        starts_G = starts_P[indices_G]
        if n < _FIRST_DUPLICATE:
            covered, at_most = _most_frequent(starts_G, is_first_G, n, lengths_N)
            reason = f"top_{n}_grams"
        else:
            covered, at_most = starts_G[~is_first_G], n_chars
            reason = f"duplicate_{n}_grams"
        if at_most / n_chars > limit and _chars_in(covered, n, lengths_N) / n_chars > limit:
            return reason
        # A longer sequence can occur again only where the one that it begins with does.
        indices_G.sort()
        starts_P, keys_P = starts_P[indices_G], keys_P[indices_G]
    return None


def _groups(keys_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the keys that occur several times, equal keys side by side and ascending; and which is its key's first."""
    order_P = np.argsort(keys_P, kind="stable")
    sorted_P = keys_P[order_P]
    is_new = np.ones(len(keys_P) + 1, bool)
    np.not_equal(sorted_P[1:], sorted_P[:-1], out=is_new[1:-1])
    several_P = ~(is_new[:-1] & is_new[1:])
    return order_P[several_P], is_new[:-1][several_P]


def _most_frequent(
    starts_G: np.ndarray, is_first_G: np.ndarray, n: int, lengths_N: np.ndarray
) -> tuple[np.ndarray, int]:
    """Where the most frequent sequence begins, and its characters counted without regard to overlaps.

    Of equally frequent ones it is the one of most characters, then the earliest.
    """
    begins = np.flatnonzero(is_first_G)
    counts = np.append(begins[1:], len(starts_G)) - begins
    tied = np.flatnonzero(counts == counts.max())
    firsts = starts_G[begins[tied]]
    chars = lengths_N[np.add.outer(firsts, np.arange(n))].sum(axis=1)
    best = np.lexsort((firsts, -chars))[0]
    begin, count = begins[tied[best]], counts[tied[best]]
    return starts_G[begin : begin + count], int(count * chars[best])


def _chars_in(starts: np.ndarray, n: int, lengths_N: np.ndarray) -> int:
    """Characters of the words in sequences of n that begin at `starts`, each word once."""
    return int(lengths_N[np.unique(np.add.outer(starts, np.arange(n)))].sum())
