"""Repetition: against a definition in plain Python, and at each bound."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from cleaning_texts import SENTENCES, SPACELESS, prose
from hypothesis import given
from hypothesis import strategies as st

from grist_data.cleaning import CleanConfig, Cleaner

OPEN: dict[str, Any] = {
    "repetition": True,
    "max_duplicate_paragraphs": 1.0,
    "max_duplicate_paragraph_chars": 1.0,
    "max_duplicate_lines": 1.0,
    "max_duplicate_line_chars": 1.0,
    "max_top_ngram_chars": (1.0,) * 3,
    "max_duplicate_ngram_chars": (1.0,) * 6,
}


def opened(**change: Any) -> CleanConfig:
    return CleanConfig(**OPEN | change)


def reason(text: str, **change: Any) -> str | None:
    return Cleaner(opened(**change)).reason(text)


def test_defaults_are_table_a1():
    config = CleanConfig()
    assert (config.max_duplicate_lines, config.max_duplicate_paragraphs) == (0.30, 0.30)
    assert (config.max_duplicate_line_chars, config.max_duplicate_paragraph_chars) == (0.20, 0.20)
    assert config.max_top_ngram_chars == (0.20, 0.18, 0.16)
    assert config.max_duplicate_ngram_chars == (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)


def test_prose_passes_as_published():
    assert Cleaner(CleanConfig(repetition=True)).reason(prose()) is None


def distinct(n: int, chars: int = 4, first: int = 0) -> list[str]:
    return [f"{k:0{chars}d}" for k in range(first, first + n)]


@pytest.mark.parametrize(
    ("option", "bound", "inside", "outside", "name"),
    [
        (
            "max_duplicate_paragraphs",
            0.3,
            "\n\n".join(["same"] * 4 + distinct(6)),
            "\n \n".join(["same"] * 5 + distinct(5)),
            "duplicate_paragraphs",
        ),
        (
            "max_duplicate_paragraph_chars",
            0.2,
            "\n\n".join(["long" * 2] * 2 + distinct(6)),  # 8 of 40
            "\n\n".join(["long" * 2] * 2 + distinct(5)),
            "duplicate_paragraph_chars",
        ),
        (
            "max_duplicate_lines",
            0.3,
            "\n".join(["same", "", " same "] + ["same"] * 2 + distinct(6)),
            "\n".join(["same"] * 3 + [" same", "", "same "] + distinct(5)),
            "duplicate_lines",
        ),
        (
            "max_duplicate_line_chars",
            0.2,
            "\n".join(["long" * 2] * 2 + distinct(6)),
            "\n".join(["long" * 2] * 2 + distinct(5)),
            "duplicate_line_chars",
        ),
    ],
)
def test_paragraphs_and_lines(option, bound, inside, outside, name):
    assert reason(inside, **{option: bound}) is None
    assert reason(outside, **{option: bound}) == name
    assert reason(outside) is None


@pytest.mark.parametrize("n", [2, 3, 4])
def test_most_frequent_sequence(n):
    """Two occurrences of n words of four characters: 2 n of N words."""
    bounds = [1.0] * 3
    bounds[n - 2] = 0.2
    phrase = distinct(n, first=1000)

    def text(others: int) -> str:
        return " ".join([*phrase, *distinct(others - 3), *phrase, *distinct(3, first=500)])

    assert reason(text(8 * n), max_top_ngram_chars=bounds) is None
    assert reason(text(8 * n - 1), max_top_ngram_chars=bounds) == f"top_{n}_grams"


@pytest.mark.parametrize("n", [5, 6, 7, 8, 9, 10])
def test_duplicate_sequences(n):
    """The second occurrence counts, the first does not: n of N words."""
    bounds = [1.0] * 6
    bounds[n - 5] = 0.1
    phrase = distinct(n, first=1000)

    def text(words: int) -> str:
        return " ".join([*phrase, "and", *phrase, *distinct(words - 2 * n)]).replace("and", "0and")

    assert reason(text(10 * n - 1), max_duplicate_ngram_chars=bounds) is None
    assert reason(text(10 * n - 2), max_duplicate_ngram_chars=bounds) == f"duplicate_{n}_grams"
    cut = " ".join([*phrase, "0and", *phrase[1:], *distinct(5)])
    assert reason(cut, max_duplicate_ngram_chars=bounds) is None


def test_a_sequence_that_occurs_once_is_no_repetition():
    assert Cleaner(CleanConfig(repetition=True)).reason("two words") is None


def defined(words: list[str], config: CleanConfig) -> str | None:
    """The rules about sequences, as they read."""
    chars = sum(map(len, words))

    def share(starts: list[int], n: int) -> float:
        return sum(len(words[k]) for k in {start + k for start in starts for k in range(n)}) / chars

    for n in range(2, 11):
        grams = [tuple(words[k : k + n]) for k in range(len(words) - n + 1)]
        counts = Counter(grams)
        if not counts or max(counts.values()) < 2:
            continue
        if n < 5:
            top = max(counts, key=lambda gram: (counts[gram], len("".join(gram)), -grams.index(gram)))
            if share([k for k, gram in enumerate(grams) if gram == top], n) > config.max_top_ngram_chars[n - 2]:
                return f"top_{n}_grams"
        else:
            later = [k for k, gram in enumerate(grams) if gram in grams[:k]]
            if share(later, n) > config.max_duplicate_ngram_chars[n - 5]:
                return f"duplicate_{n}_grams"
    return None


WORDS = st.lists(st.sampled_from(["a", "bb", "ccc", "dddd", "eeeee", "ffffff"]), max_size=40)
SHARE = st.floats(0, 1)


@given(WORDS, st.tuples(*[SHARE] * 3), st.tuples(*[SHARE] * 6))
def test_sequences_as_defined(words, top, duplicate):
    config = opened(max_top_ngram_chars=top, max_duplicate_ngram_chars=duplicate)
    assert Cleaner(config).reason(" ".join(words)) == (defined(words, config) if words else None)


@given(WORDS, SHARE)
def test_long_sequences_as_defined(words, limit):
    """With the short sequences out of the way."""
    config = opened(max_duplicate_ngram_chars=(1.0, limit, limit / 2, limit / 4, limit / 8, 0.0))
    words = words + words[5:]
    assert Cleaner(config).reason(" ".join(words)) == (defined(words, config) if words else None)


@pytest.mark.parametrize("language", SPACELESS)
def test_scripts_without_spaces_are_judged_by_lines(language):
    parts = [SENTENCES[language][k:] for k in range(10)]
    cleaner = Cleaner(CleanConfig(repetition=True))
    assert cleaner.reason("\n".join(parts)) is None
    assert cleaner.reason("\n".join([*parts[:5], *parts[:5]])) == "duplicate_lines"
