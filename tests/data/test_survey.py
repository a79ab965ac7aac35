"""The split: decided by text and seed alone, never empty on either side, copies never divided."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_corpus import corpus_texts

from grist_data.document import Document
from grist_data.survey import Survey, decide_split, take_survey, text_hash


def documents(texts) -> list[Document]:
    return [Document(text, f"text {k}") for k, text in enumerate(texts)]


def held_out(texts, fraction: float, seed: int = 0) -> set[str]:
    split = decide_split(take_survey(documents(texts), 1000, seed), fraction, seed)
    return {d.text for d in documents(texts) if split.name_of(text_hash(d)) == "val"}


def test_the_fraction_is_met():
    texts = [str(k) for k in range(20_000)]
    assert 0.045 < len(held_out(texts, 0.05)) / len(texts) < 0.055


def test_adding_documents_moves_none():
    texts = corpus_texts(300)
    before = held_out(texts[:200], 0.2)
    assert before == held_out(texts, 0.2) & set(texts[:200])
    assert before == held_out(texts[:200][::-1], 0.2)


def test_seeds_hold_out_different_documents():
    texts = corpus_texts(200)
    assert held_out(texts, 0.2, seed=0) == held_out(texts, 0.2, seed=0)
    assert held_out(texts, 0.2, seed=0) != held_out(texts, 0.2, seed=1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=2, max_size=6), st.floats(1e-9, 0.999999), st.integers(0, 50))
def test_no_split_is_empty(texts, fraction, seed):
    if len(set(texts)) == 1:
        return
    chosen = held_out(texts, fraction, seed)
    assert chosen
    assert chosen != set(texts)


def test_adjustment_takes_the_lowest_and_is_recorded():
    texts = corpus_texts(5)
    survey = take_survey(documents(texts), 10**6, 0)
    plain, adjusted = decide_split(survey, 0.5, 0), decide_split(survey, 1e-12, 0)
    assert (plain.adjusted, adjusted.adjusted) == (False, True)
    assert adjusted.threshold == survey.lowest + 1
    assert len(held_out(texts, 1e-12)) == 1
    assert len(held_out(texts, 1 - 1e-12)) == 4


def test_no_validation_split_on_request():
    assert held_out(["only one"], 0.0) == set()


@pytest.mark.parametrize(("texts", "copies"), [(["one"], ""), (["same", "same"], r" \(2 copies of it\)")])
def test_a_single_document_cannot_be_split(texts, copies):
    with pytest.raises(
        ValueError, match=f"single document{copies}, so none can be held out: .*separator.*val_fraction to 0"
    ):
        held_out(texts, 0.1)


def test_empty_corpus():
    with pytest.raises(ValueError, match="the corpus is empty"):
        take_survey([], 1000, 0)


def test_units_are_consecutive_documents_and_survive_json():
    texts = corpus_texts(50)
    survey = take_survey(documents(texts), 3000, 0)
    assert survey.documents == 50
    assert survey.text_bytes == sum(len(text.encode()) for text in texts)
    assert len(survey.units) > 3
    assert all(unit.text_bytes >= 3000 for unit in survey.units[:-1])
    assert Survey.from_json(survey.to_json()) == survey
    changed = take_survey(documents([*texts[:-1], "else"]), 3000, 0)
    assert changed.units[0] == survey.units[0]
    assert changed.digest() != survey.digest()


def test_half_of_a_utf16_pair_is_refused():
    with pytest.raises(ValueError, match=r"document text 0 holds half of a UTF-16 pair \('.ud800'\)"):
        take_survey(documents(["a\ud800"]), 1000, 0)
