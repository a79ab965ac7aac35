"""One document at a time: which rule comes first, and that nothing but text and settings decides."""

from __future__ import annotations

import pickle

import pytest
from cleaning_texts import SENTENCES, prose
from hypothesis import given
from hypothesis import strategies as st

from grist_data.cleaning import REASONS, CleanConfig, Cleaner

STRICT = CleanConfig(min_chars=3, max_chars=5000, quality="gopher+c4", repetition=True)
TEXTS = [prose(), prose(30), prose() * 2, "{", "# " * 60, "", *SENTENCES.values()]


@pytest.mark.parametrize(
    ("text", "expected"), [("ab", "too_short"), ("abc", None), ("abcd", None), ("abcde", "too_long")]
)
def test_length_in_characters(text, expected):
    assert Cleaner(CleanConfig(min_chars=3, max_chars=4)).reason(text) == expected
    assert Cleaner(CleanConfig(min_chars=3, max_chars=4)).reason(text.replace("a", "磨")) == expected


def test_the_first_broken_rule_is_the_reason():
    cleaner = Cleaner(STRICT)
    assert cleaner.reason("{") == "too_short"
    assert cleaner.reason("{ }\n" * 10) == "few_words"
    assert cleaner.reason(prose() * 2 + "{") == "curly_bracket"
    assert cleaner.reason(prose() * 2) == "duplicate_lines"
    assert cleaner.reason(prose()) is None


@given(st.text())
def test_any_text_has_a_reason_of_the_list_or_none(text):
    reason = Cleaner(STRICT).reason(text)
    assert reason is None or reason in REASONS


@given(st.permutations(TEXTS))
def test_what_came_before_does_not_matter(texts):
    cleaner = Cleaner(STRICT)
    together = {text: cleaner.reason(text) for text in texts}
    assert together == {text: Cleaner(STRICT).reason(text) for text in TEXTS}


def test_half_of_a_utf16_pair_is_judged_too():
    assert Cleaner(CleanConfig(repetition=True)).reason("a\ud800 b c") is None


def test_settings_travel_to_workers():
    assert pickle.loads(pickle.dumps(STRICT)) == STRICT
