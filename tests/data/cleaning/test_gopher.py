"""Gopher's rules for quality: a text exactly at each bound stays, one just beyond it goes."""

from __future__ import annotations

from typing import Any

import pytest
from cleaning_texts import SENTENCES, SPACELESS, prose

from grist_data.cleaning import CleanConfig, Cleaner

# Every rule open, so that a test closes the one that it is about.
OPEN: dict[str, Any] = {
    "quality": "gopher",
    "min_words": 0,
    "min_mean_word_chars": 0.0,
    "max_mean_word_chars": 1000.0,
    "max_symbols_per_word": 100.0,
    "max_bullet_lines": 1.0,
    "max_ellipsis_lines": 1.0,
    "min_alphabetic_words": 0.0,
    "min_stop_words": 0,
}


def reason(text: str, **change: Any) -> str | None:
    return Cleaner(CleanConfig(**OPEN | change)).reason(text)


def test_prose_passes_all_rules_as_published():
    assert Cleaner(CleanConfig(quality="gopher")).reason(prose()) is None


def test_defaults_are_the_published_thresholds():
    config = CleanConfig()
    assert (config.min_words, config.max_words) == (50, 100_000)
    assert (config.min_mean_word_chars, config.max_mean_word_chars) == (3, 10)
    assert (config.max_symbols_per_word, config.max_bullet_lines, config.max_ellipsis_lines) == (0.1, 0.9, 0.3)
    assert (config.min_alphabetic_words, config.min_stop_words) == (0.8, 2)
    assert config.stop_words == ("the", "be", "to", "of", "and", "that", "have", "with")


@pytest.mark.parametrize(
    ("option", "bound", "inside", "outside", "name"),
    [
        ("min_words", 50, "word " * 50, "word " * 49, "few_words"),
        ("max_words", 50, "word " * 50, "word " * 51, "many_words"),
        ("min_mean_word_chars", 3, "aa bbbb ccc", "aa bbb ccc", "short_words"),
        ("max_mean_word_chars", 10, "a" * 9 + " " + "b" * 11, "a" * 10 + " " + "b" * 11, "long_words"),
        ("max_symbols_per_word", 0.1, "#word" + " word" * 9, "##word" + " word" * 9, "hash_symbols"),
        ("max_symbols_per_word", 0.1, "word..." + " word" * 9, "word... word…" + " word" * 8, "ellipses"),
        (
            "max_symbols_per_word",
            0.1,
            "word…" + " word" * 29 + "... ##",
            "word…" + " word" * 29 + "... ......",
            "ellipses",
        ),
        ("max_bullet_lines", 0.9, "- word\n• word\n* word\n" * 3 + "word\n", "- word\n• word\n" * 5, "bullet_lines"),
        ("max_ellipsis_lines", 0.3, "word...\n" * 3 + "word\n" * 7, "word …\n" * 4 + "word\n" * 6, "ellipsis_lines"),
        ("min_alphabetic_words", 0.8, "w0rd 1a. é! ok 17", "w0rd 1a. -- ok 17", "few_alphabetic_words"),
        ("min_stop_words", 2, "the grain of truth", "the grain The truth", "few_stop_words"),
        ("min_stop_words", 2, '"The grain, and', '"The grain, stand', "few_stop_words"),
    ],
)
def test_just_inside_and_just_outside(option, bound, inside, outside, name):
    assert reason(inside, **{option: bound}) is None
    assert reason(outside, **{option: bound}) == name
    assert reason(outside) is None


def test_lines_without_visible_characters_do_not_count():
    assert reason("- word\n\n \n" * 9 + "- word", max_bullet_lines=0.9) == "bullet_lines"


def test_bounds_are_exact_where_floats_are_not():
    """0.29 * 100 is below 29 in floating point."""
    assert reason("word...\n" * 29 + "word\n" * 71, max_ellipsis_lines=0.29) is None
    assert reason("word...\n" * 30 + "word\n" * 70, max_ellipsis_lines=0.29) == "ellipsis_lines"


@pytest.mark.parametrize("language", SPACELESS)
def test_rules_about_words_spare_scripts_without_spaces(language):
    cleaner = Cleaner(CleanConfig(quality="gopher"))
    assert cleaner.reason(SENTENCES[language] * 5) is None
    assert cleaner.reason((SENTENCES[language] + "\n") * 5) is None
    assert cleaner.reason(("• " + SENTENCES[language] + "\n") * 5) == "bullet_lines"
    assert cleaner.reason((SENTENCES[language] + "…\n") * 5) == "ellipsis_lines"


@pytest.mark.parametrize("language", sorted(set(SENTENCES) - set(SPACELESS)))
def test_languages_with_spaces_need_their_own_stop_words(language):
    sentence = SENTENCES[language]
    text = f"{sentence}\n" * 10
    own = tuple(sorted({word.strip(".,،।").lower() for word in sentence.split()}))[:6]
    assert Cleaner(CleanConfig(quality="gopher", stop_words=own)).reason(text) is None
    assert Cleaner(CleanConfig(quality="gopher", min_stop_words=0)).reason(text) is None
    assert Cleaner(CleanConfig(quality="gopher")).reason(text) == (None if language == "en" else "few_stop_words")
