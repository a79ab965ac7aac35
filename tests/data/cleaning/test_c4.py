"""C4's rules for whole documents."""

from __future__ import annotations

from typing import Literal

import pytest
from cleaning_texts import SENTENCES, SPACELESS, prose

from grist_data.cleaning import CleanConfig, Cleaner

LINE = "This line has five words.\n"


def reason(text: str, quality: Literal["c4", "gopher+c4"] = "c4") -> str | None:
    return Cleaner(CleanConfig(quality=quality)).reason(text)


@pytest.mark.parametrize(
    ("inside", "outside", "name"),
    [
        (LINE * 3 + "lorem\nipsum", LINE * 3 + "Lorem ipsum", "lorem_ipsum"),
        (LINE * 3 + "(braces)", LINE * 3 + "{braces", "curly_bracket"),
        (LINE * 3, LINE * 2, "few_sentences"),
        (LINE * 2 + "Here are five short words?", LINE * 2 + "Here are four words?", "few_sentences"),
        (LINE * 2 + 'He said "these five words"', LINE * 2 + "He said just these words", "few_sentences"),
        (LINE * 2 + "And so it went on.", LINE * 2 + "And so it went on...", "few_sentences"),
        (LINE * 2 + "Coffee has to be enabled.", LINE * 2 + "JavaScript has to be enabled.", "few_sentences"),
        (LINE * 2 + "Please read our news daily.", LINE * 2 + "Please read our Privacy Policy.", "few_sentences"),
        (LINE * 2 + "A fact with source named.[12]", LINE * 2 + "A fact with source.[12]", "few_sentences"),
        ("One of it! Two of it? Three.", "One of it, two of it? Three.", "few_sentences"),
        ("It costs 3.14 a loaf. Is it cheap? So!", "It costs 3.14 a loaf. Is it cheap, so!", "few_sentences"),
    ],
)
def test_just_inside_and_just_outside(inside, outside, name):
    assert reason(inside) is None
    assert reason(outside) == name


def test_prose_passes():
    assert reason(prose()) is None


@pytest.mark.parametrize("language", sorted(set(SENTENCES) - set(SPACELESS)))
def test_end_marks_of_other_scripts_count(language):
    assert reason(f"{SENTENCES[language]} " * 3) is None
    assert reason(f"{SENTENCES[language]} " * 2) == "few_sentences"


@pytest.mark.parametrize("language", SPACELESS)
def test_sentences_are_not_asked_of_scripts_without_spaces(language):
    assert reason(SENTENCES[language]) is None
    assert reason(SENTENCES[language] + "{") == "curly_bracket"


def test_both_sets_of_rules():
    assert reason(prose(), quality="gopher+c4") is None
    assert reason(LINE * 3, quality="gopher+c4") == "few_words"
    assert reason(prose() + "{", quality="gopher+c4") == "curly_bracket"
