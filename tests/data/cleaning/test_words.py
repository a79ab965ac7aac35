"""What a word is, in scripts with and without spaces."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cleaning_texts import SENTENCES, SPACELESS
from hypothesis import given
from hypothesis import strategies as st

from grist_data.cleaning import words
from grist_data.cleaning.words import WordHashes, is_spaceless, tokens


@pytest.mark.parametrize("language", SENTENCES)
def test_spaceless_scripts_are_recognized(language):
    assert is_spaceless(SENTENCES[language]) == (language in SPACELESS)


def test_a_fifth_of_the_characters_decides():
    assert is_spaceless("磨粉" + "a" * 8)
    assert is_spaceless("磨粉 \n\t" + "a" * 8)
    assert not is_spaceless("磨粉" + "a" * 9)
    assert not is_spaceless("")
    assert not is_spaceless("é")


def test_tokens():
    assert tokens("The Mill's stones, 2 of_them!") == ["the", "mill", "s", "stones", "2", "of_them"]
    assert tokens("Über naïve Müller") == ["über", "naïve", "müller"]
    assert tokens("磨坊 and パン x") == ["磨", "坊", "and", "パ", "ン", "x"]
    assert tokens("... !?") == []


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_ascii_is_no_special_case(text):
    assert tokens(text) == words._TOKEN.findall(text.lower())


def test_hashes_are_the_same_in_every_process():
    code = "from grist_data.cleaning.words import WordHashes; print(WordHashes().of(['mill', 'Mühle', '磨']).tolist())"
    here = WordHashes().of(["mill", "Mühle", "磨"]).tolist()
    env = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == str(here)


def test_memory_of_words_is_bounded(monkeypatch):
    monkeypatch.setattr(words, "_REMEMBERED_WORDS", 10)
    hashes, many = WordHashes(), [f"word{k}" for k in range(95)] + ["x" * 32, "x" * 33]
    first = hashes.of(many)
    assert 0 < len(hashes) <= 10
    assert "x" * 32 in hashes
    assert "x" * 33 not in hashes
    assert (hashes.of(many) == first).all()
    assert len(set(first.tolist())) == len(many)
