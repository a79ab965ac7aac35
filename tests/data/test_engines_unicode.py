"""What two engines know of Unicode is compared character by character, and where they differ the reference decides."""

from __future__ import annotations

import importlib.util
import unicodedata

import numpy as np
import pytest

from grist_data import engine_gigatoken, engine_tiktoken, engine_unicode
from grist_data.engine_unicode import CHARACTERS, CLASSES, disputed, holds_any, index_of, reference_classes, version_of
from grist_data.engines import open_engine
from grist_data.patterns import GPT2, KNOWN, LLAMA3, O200K
from grist_data.tiktoken_export import from_ranks


def test_classes_are_those_of_unicode():
    """Of what Python's older tables know, but for the few characters that changed their category since."""
    category_in = {"L": {"Lu", "Ll", "Lt", "Lm", "Lo"}, "N": {"Nd", "Nl", "No"}, "M": {"Mn", "Mc", "Me"}}
    categories = np.array([unicodedata.category(character) for character in CHARACTERS])
    assigned, classes = categories != "Cn", reference_classes()
    for pattern, members in [(r"\p{L}", "L"), (r"\p{N}", "N"), (r"\p{M}", "M")]:
        found = (classes >> CLASSES.index(pattern)) & 1
        expected = np.isin(categories, [*category_in[members]])
        assert (found != expected)[assigned].sum() < 20
        assert found[assigned].sum() > 1000


def test_engines_that_agree_dispute_nothing():
    assert not disputed(reference_classes()).any()
    assert not disputed(reference_classes().astype(np.int64) * 3 + 7).any(), "only which are alike matters"


@pytest.mark.parametrize("characters", ["א", "\u3000", "小麦", "éß"])
def test_characters_that_are_taken_differently_are_disputed(characters):
    behaviour = reference_classes().copy()
    for character in characters:
        behaviour[index_of(ord(character))] ^= 0x80
    table = disputed(behaviour)
    assert {chr(code_point) for code_point in np.flatnonzero(table)} == set(characters)
    assert not holds_any("plain text, naïve, \U0010ffff \ud800", table)
    for character in characters:
        assert holds_any(f"plain text, {character}", table)
        assert holds_any("x" * (1 << 20) + "ï" + character, table)


def test_tiktoken_and_the_reference_are_compared():
    ours, theirs = (
        reference_classes(),
        engine_unicode.classes_of(lambda regex: engine_tiktoken._kept(regex, CHARACTERS)),
    )
    found = [chr(code_point) for code_point in np.flatnonzero(engine_tiktoken._disputed())]
    assert [CHARACTERS[k] for k in np.flatnonzero(ours != theirs)] == found


@pytest.mark.parametrize("pattern", KNOWN)
def test_gigatoken_and_the_reference_are_compared(pattern):
    if importlib.util.find_spec("gigatoken") is None:
        pytest.skip("the engine gigatoken is not installed")
    found = engine_gigatoken._disputed(pattern)
    newer = engine_gigatoken.unicode_version() == "17" and not (reference_classes()[index_of(0x16EBB)] & 1)
    assert found[0x16EBB] == newer
    assert engine_gigatoken.holds_disputed(pattern, "a\U00016ebb") == newer
    assert not engine_gigatoken.holds_disputed(pattern, "Grain, naïve Straße 小麦 ½ א e\u0301 \u3000 🌾")


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3, O200K])
def test_gigatoken_tells_the_classes_of_a_pattern_apart(pattern):
    if importlib.util.find_spec("gigatoken") is None:
        pytest.skip("the engine gigatoken is not installed")
    behaviour = engine_gigatoken._behaviour(pattern, CHARACTERS)
    alike = {character: behaviour[index_of(ord(character))] for character in "éÉא½\u3000\u0301«"}
    apart = "é½\u3000«" if pattern != O200K else "éÉא½\u3000\u0301«"
    assert len({alike[character] for character in apart}) == len(apart)


def test_versions_are_told_by_their_letters():
    assert version_of(lambda code_point: False) == "before 12"
    assert version_of(lambda code_point: code_point in (0x10FE0, 0x10E80)) == "13"
    assert version_of(lambda code_point: True) == "17"
    own = version_of(lambda code_point: unicodedata.category(chr(code_point)) in ("Ll", "Lo"))
    assert unicodedata.unidata_version.startswith(own)


@pytest.mark.parametrize("pattern", KNOWN)
@pytest.mark.parametrize("name", ["tiktoken", "gigatoken"])
def test_every_character_is_split_off_as_by_the_reference(name, pattern):
    """With tokens that go over the border between a letter and the character, so that the ids tell where it is."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the engine {name} is not installed")
    borders = [bytes([first, second]) for first in b"aA!0" for second in range(0xC2, 0xF5)]
    ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + k for k, token in enumerate(borders)}
    tokenizer = from_ranks(ranks, {}, pattern)
    engine = open_engine(tokenizer, name)
    hard = [character for character in CHARACTERS if engine.is_hard(character)]
    texts = [
        f"{before}{character}" for character in (*hard, *CHARACTERS[:: len(CHARACTERS) // 997]) for before in "aA!0"
    ]
    expected = tokenizer.encode_batch(texts)
    assert all(map(np.array_equal, engine.encode_batch(texts), expected))
    different = [
        text for text, ids, right in zip(texts, engine.encode(texts), expected, strict=True) if [*ids] != [*right]
    ]
    assert {text[1] for text in different} <= set(hard)
    assert len({text[1] for text in different}) >= 0.9 * len(hard), "what goes to the reference has to"
