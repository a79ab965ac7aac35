"""The split: decided by text and seed alone, never empty on either side, copies never divided."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from text_corpus import corpus_texts

from grist_data import duplicates
from grist_data.cleaning import CleanConfig
from grist_data.document import Document
from grist_data.plan import Plan, decide_split, make_plan
from grist_data.survey import DUPLICATE, split_hash, split_hasher, survey_documents, text_hash


def documents(texts) -> list[Document]:
    return [Document(text, f"text {k}") for k, text in enumerate(texts)]


def take_survey(documents, unit_bytes: int, seed: int, spans: int = 1, deduplicate: bool = False, dropped=None) -> Plan:
    """The plan of documents in so many spans."""
    size = max(1, -(-len(documents) // spans))
    surveys = [survey_documents(documents[at : at + size], seed) for at in range(0, max(len(documents), 1), size)]
    later = duplicates.later_reasons(lambda: iter(surveys), deduplicate, CleanConfig(), Path())
    return make_plan(lambda: iter(surveys), "", unit_bytes, later, None if dropped is None else dropped.__setitem__)


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


visible = st.text(min_size=1).filter(lambda text: not text.isspace())


@settings(max_examples=200, deadline=None)
@given(st.lists(visible, min_size=2, max_size=6), st.floats(1e-9, 0.999999), st.integers(0, 50))
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
    assert Plan.from_json(json.loads(json.dumps(survey.to_json()))) == survey
    changed = take_survey(documents([*texts[:-1], "else"]), 3000, 0)
    assert changed.units[0] == survey.units[0]
    assert changed.digest() != survey.digest()


def test_half_of_a_utf16_pair_is_refused():
    with pytest.raises(ValueError, match=r"document text 0 holds half of a UTF-16 pair \('.ud800'\)"):
        take_survey(documents(["a\ud800"]), 1000, 0)


def test_the_framed_split_hash_is_the_split_hash():
    for seed in (0, 1, 2**64 - 1, -1):
        digest = xxhash.xxh3_128_digest(str(seed).encode())
        assert split_hasher(seed)(digest) == split_hash(digest, seed)


@pytest.mark.parametrize("spans", [1, 3, 7])
def test_units_end_with_their_span(spans):
    texts = corpus_texts(50)
    plan = take_survey(documents(texts), 3000, 0, spans)
    assert {unit.span for unit in plan.units} == set(range(len({unit.span for unit in plan.units})))
    assert (plan.documents, plan.text_bytes) == (50, sum(len(text.encode()) for text in texts))
    for before, after in itertools.pairwise(plan.units):
        if before.span == after.span:
            assert before.text_bytes >= 3000
            assert before.stop == after.first
        else:
            assert after.first == 0
    assert take_survey(documents(texts), 3000, 0).lowest == plan.lowest


@pytest.mark.parametrize("spans", [1, 2, 5])
@pytest.mark.parametrize("at_once", [8_000_000, 7])
def test_later_copies_are_dropped(spans, at_once, monkeypatch):
    monkeypatch.setattr(duplicates.later_copies, "__defaults__", (at_once,))
    draw = random.Random(0)
    texts = [draw.choice(["grain", "mill", "", "flour " * 9, "stone", str(k)]) for k in range(60)]
    dropped: dict = {}
    plan = take_survey(documents(texts), 20, 0, spans, deduplicate=True, dropped=dropped)
    size = -(-len(texts) // spans)
    gone = {int(span * size + place) for span, codes in dropped.items() for place in np.flatnonzero(codes == DUPLICATE)}
    kept = [text for k, text in enumerate(texts) if k not in gone and text]
    assert kept == list(dict.fromkeys(text for text in texts if text))
    assert plan.documents == len(kept)
    assert plan.dropped["duplicate"]["documents"] == len(gone)
    assert plan.dropped["empty"] == {"documents": texts.count(""), "text_bytes": 0}
    copies = take_survey(documents(texts), 20, 0, spans)
    assert "duplicate" not in copies.dropped
    assert (copies.lowest, copies.highest) == (plan.lowest, plan.highest)


class NoMills:
    def reason(self, text: str) -> str | None:
        return "grinding" if "mill" in text else None

    def signature(self, text: str) -> None:
        return None


def test_what_cleaning_says_is_counted():
    texts = ["grain", "mill mill", "flour", "mill"]
    survey = survey_documents(documents(texts), 0, NoMills())
    assert [survey.names[code] for code in survey.reasons] == ["kept", "grinding", "kept", "grinding"]
    plan = make_plan(lambda: iter([survey]), "", 1)
    assert plan.dropped == {"grinding": {"documents": 2, "text_bytes": 13}}
    assert [(unit.first, unit.stop, unit.documents) for unit in plan.units] == [(0, 1, 1), (1, 4, 1)]
    gone = survey_documents(documents(["mill", " "]), 0, NoMills())
    with pytest.raises(ValueError, match=r"stays \(left out: 1 empty, 1 grinding\)"):
        make_plan(lambda: iter([gone]), "", 1)


def test_replaced_characters_are_counted():
    survey = survey_documents([Document("a\ufffd", "a", "", 1), Document("b", "b"), Document(" ", "c", "", 4)], 0)
    plan = make_plan(lambda: iter([survey]), "", 1)
    assert plan.replaced == {"documents": 1, "characters": 1}
