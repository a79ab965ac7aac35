"""The settings: off by default, checked when made, plain values."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re

import pytest

from grist_data.cleaning import REASONS, CleanConfig, Cleaner


def test_nothing_is_left_out_by_default():
    cleaner = Cleaner(CleanConfig())
    assert not CleanConfig().enabled
    assert [cleaner.reason(text) for text in ("", "x", "{ lorem ipsum }\n" * 100)] == [None] * 3
    assert cleaner.signature("a text") is None
    assert cleaner.versions() == {}


@pytest.mark.parametrize(
    "change",
    [
        {"min_chars": 1},
        {"max_chars": 10**9},
        {"languages": ("en",)},
        {"quality": "gopher"},
        {"quality": "c4"},
        {"repetition": True},
        {"near_duplicates": True},
    ],
)
def test_each_switch_enables(change):
    assert CleanConfig(**change).enabled


def test_settings_survive_json():
    config = CleanConfig(languages=("de", "en"), min_stop_words=0, quality="gopher+c4", max_chars=10)
    assert CleanConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_every_option_is_described():
    described = re.findall(
        r"^        (\w+): ", inspect.cleandoc(CleanConfig.__doc__ or "").replace("\n    ", "\n        "), re.M
    )
    assert described == [field.name for field in dataclasses.fields(CleanConfig)]


def test_reasons_are_stable_codes_of_one_byte():
    codes = list(REASONS.values())
    assert len(set(codes)) == len(codes)
    assert codes == sorted(codes)
    assert REASONS["kept"] == 0
    assert max(codes) < 100
    # Stored in files: a code must keep its meaning.
    assert {name: REASONS[name] for name in ("too_short", "few_words", "curly_bracket", "near_duplicate")} == {
        "too_short": 1,
        "few_words": 10,
        "curly_bracket": 31,
        "near_duplicate": 70,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_chars": -1}, "min_chars must be at least 0, but is -1"),
        ({"min_chars": 5, "max_chars": 4}, "max_chars must be at least min_chars, 5, but is 4"),
        ({"min_words": 5, "max_words": 4}, "max_words must be at least min_words, 5, but is 4"),
        ({"max_mean_word_chars": 2}, "max_mean_word_chars must be at least min_mean_word_chars, 3.0, but is 2"),
        ({"max_symbols_per_word": -0.1}, "max_symbols_per_word must be at least 0, but is -0.1"),
        ({"max_bullet_lines": 1.1}, "max_bullet_lines is a share from 0 to 1, but is 1.1"),
        ({"min_language_score": -1}, "min_language_score is a share from 0 to 1, but is -1"),
        (
            {"max_top_ngram_chars": (0.2,)},
            "max_top_ngram_chars needs 3 shares, for sequences of 2 to 4 words, but has 1",
        ),
        ({"max_duplicate_ngram_chars": (2.0,) * 6}, "max_duplicate_ngram_chars is a share from 0 to 1, but is 2.0"),
        ({"max_duplicate_ngram_chars": ()}, "max_duplicate_ngram_chars needs 6 shares"),
        ({"quality": "good"}, "quality must be none, gopher, c4 or gopher.c4, but is 'good'"),
        ({"languages": ("english",)}, "languages are codes of two or three letters, such as en, but got 'english'"),
        (
            {"quality": "gopher", "stop_words": ("The", "of")},
            "stop_words are single words in lower case, but one is 'The'",
        ),
        ({"quality": "gopher", "stop_words": ("the", "of a")}, "stop_words are single words .* 'of a'"),
        ({"quality": "gopher", "stop_words": ("the", "the")}, "min_stop_words is 2, but stop_words are 1"),
        (
            {"quality": "gopher", "languages": ("en", "de")},
            "stop_words are English, but languages has de: give stop_words",
        ),
        ({"threshold": 0.2}, "threshold must be from 0.3 to 1, but is 0.2"),
        ({"num_perm": 8}, "num_perm must be from 16 to 1024, but is 8"),
        ({"shingle": 0}, "shingle must be from 1 to 100, but is 0"),
        ({"minhash_seed": -1}, r"minhash_seed must be from 0 to 2\*\*64 - 1, but is -1"),
        ({"minhash_seed": 2**64}, r"minhash_seed must be from 0 to 2\*\*64 - 1, but is 18446744073709551616"),
    ],
)
def test_errors_name_the_option(change, message):
    with pytest.raises(ValueError, match=message):
        CleanConfig(**change)


def test_a_range_may_be_a_single_value():
    cleaner = Cleaner(CleanConfig(min_chars=2, max_chars=2))
    assert [cleaner.reason("x" * n) for n in (1, 2, 3)] == ["too_short", None, "too_long"]


def test_other_languages_need_their_own_stop_words_or_none():
    CleanConfig(languages=("en", "de"))
    CleanConfig(languages=("en", "de"), quality="gopher", min_stop_words=0)
    CleanConfig(languages=("en", "de"), quality="gopher", stop_words=("der", "the"))
