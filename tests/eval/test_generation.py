"""Generation scores against hand-counted values, and the file of prompts."""

from __future__ import annotations

import json
import math

import pytest

from grist_eval.generation import distinct, read_examples, repetition, score_texts


def test_distinct_counts_over_all_texts():
    assert distinct(["a b a", "b c"], 1) == 3 / 5
    assert distinct(["a b a", "b c"], 2) == 3 / 3  # ab, ba, bc: n-grams never cross from one text into the next
    assert distinct(["a", ""], 2) == 0.0


def test_repetition_is_the_share_seen_before():
    assert repetition("a b c d e", 4) == 0.0
    assert repetition("x x x x x x", 4) == pytest.approx(2 / 3)  # three 4-grams, all alike
    assert repetition("too short", 4) == 0.0


def test_bleu_is_the_formula():
    # 7 of 8 words match, 6 of 7 pairs, 5 of 6 triples, 4 of 5 fours; as long as the reference, so no brevity penalty.
    text, reference = "the cat sat on the mat right here", "the cat sat on the mat right there"
    expected = 100 * math.exp(sum(math.log(p) for p in (7 / 8, 6 / 7, 5 / 6, 4 / 5)) / 4)
    assert score_texts([text], [[reference]])["bleu"] == pytest.approx(expected)


def test_rouge_is_the_formula_and_takes_the_best_reference():
    scores = score_texts(["a b c d"], [["z z z z", "a b x d"]])
    assert scores["rouge_1"] == pytest.approx(3 / 4)
    assert scores["rouge_2"] == pytest.approx(1 / 3)
    assert scores["rouge_L"] == pytest.approx(3 / 4)


def test_texts_may_have_different_numbers_of_references():
    same = "one two three four five"
    both = score_texts([same, "a b c d e"], [[same], ["nothing in common here", "a b c d e"]])
    assert both["bleu"] == pytest.approx(100.0)
    assert both["rouge_L"] == pytest.approx(1.0)
    assert "nrefs:var" in both["bleu_signature"]
    assert both["examples"] == 2


def test_nothing_generated_scores_zero_and_does_not_fail():
    scores = score_texts([""], [["a reference"]])
    assert (scores["bleu"], scores["rouge_L"], scores["distinct_1"], scores["repetition_4"]) == (0.0, 0.0, 0.0, 0.0)


def test_one_list_of_references_a_text():
    with pytest.raises(ValueError, match="got 2 texts, 1 lists"):
        score_texts(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="got 0 texts"):
        score_texts([], [])


def test_examples_are_read_in_both_spellings(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "references": ["b", "c"]}\n\n{"prompt": "", "reference": "d"}\n')
    assert read_examples(path) == [("a", ["b", "c"]), ("", ["d"])]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"prompt": "a", "references": []}', "at least one"),
        ('{"prompt": "a", "references": ["b", " "]}', "not blank"),
        ('{"prompt": "a", "references": "b"}', "expected references to be strings"),
        ('{"prompt": "a", "reference": "b", "references": ["b"]}', "exactly one of"),
        ('{"prompt": "a"}', "exactly one of"),
        ('{"prompt": 3, "reference": "b"}', "'prompt' to be a string, got 3"),
        ('["a", "b"]', "expected an object"),
        ('{"prompt": "a", ', "not a line of JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, fault):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a", "reference": "b"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2: .*" + fault):
        read_examples(path)


def test_all_bad_rows_are_counted_and_ten_are_shown(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("{}\n" * 12)
    with pytest.raises(ValueError, match=r"12 bad row\(s\)") as caught:
        read_examples(path)
    assert str(caught.value).count("prompts.jsonl:") == 10
    assert str(caught.value).endswith("... and 2 more")


def test_bytes_that_are_no_utf8_are_a_bad_row(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "reference": "b"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: not a line of JSON in UTF-8"):
        read_examples(path)


def test_an_empty_or_missing_file_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        read_examples(path)
    with pytest.raises(FileNotFoundError):
        read_examples(tmp_path / "absent.jsonl")
