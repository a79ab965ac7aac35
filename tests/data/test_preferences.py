"""Preference pairs of every form that TRL knows: the same prompt twice, and the answers are what the mask marks."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from chat_templates import CHATML, SPECIALS
from text_corpus import corpus_texts

from grist_data.chat_template import conversation_tokens
from grist_data.preferences import pairs_of, read_preferences
from grist_data.tokenizer_training import train_bpe

USER = {"role": "user", "content": "Who grinds?"}
CHOSEN, REJECTED = {"role": "assistant", "content": "The mill."}, {"role": "assistant", "content": "Nobody."}
EXPLICIT = {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(corpus_texts(), 340, SPECIALS)


@pytest.fixture
def read(tmp_path, tokenizer):
    def of_rows(*rows, **options):
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        given: dict[str, Any] = {"template": CHATML} | options
        return read_preferences([str(file)], tokenizer, **given)

    return of_rows


@pytest.mark.parametrize(
    "row",
    [
        EXPLICIT,
        {"prompt": "Who grinds?", "chosen": "The mill.", "rejected": "Nobody."},
        {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
        {"prompt": "Who grinds?", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED], "score": 1.5},
        {"prompt": "Who grinds?", "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"prompt": [USER], "chosen": "The mill.", "rejected": "Nobody."},
        {
            "chosen": [{"from": "human", "value": "Who grinds?"}, CHOSEN],
            "rejected": [USER, {"from": "gpt", "value": "Nobody."}],
        },
    ],
)
def test_all_forms_are_one(read, tokenizer, row):
    (pair,) = read(row)
    for answer, ids, mask in (
        (CHOSEN, pair.chosen_ids, pair.chosen_mask),
        (REJECTED, pair.rejected_ids, pair.rejected_mask),
    ):
        expected = conversation_tokens(tokenizer, [USER, answer], template=CHATML)
        assert np.array_equal(ids, expected.ids)
        assert np.array_equal(mask, expected.trained)
        assert tokenizer.decode(ids[mask].tolist()) == answer["content"] + "<|im_end|>"
    prompt = int(np.argmax(pair.chosen_mask))
    assert pair.chosen_ids[:prompt].tolist() == pair.rejected_ids[:prompt].tolist()


def test_answers_of_the_prompt_do_not_count(read, tokenizer):
    before = [{"role": "system", "content": "Be brief."}, USER, CHOSEN, {"role": "user", "content": "Sure?"}]
    yes, no = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))
    for row in (
        {"prompt": before, "chosen": [yes], "rejected": [no]},
        {"chosen": [*before, yes], "rejected": [*before, no]},
        {"prompt": "Sure?", "chosen": [*before, yes], "rejected": [*before, no]},
    ):
        (pair,) = read(row)
        assert tokenizer.decode(pair.chosen_ids[pair.chosen_mask].tolist()) == "Yes.<|im_end|>"
        assert tokenizer.decode(pair.rejected_ids[pair.rejected_mask].tolist()) == "No.<|im_end|>"


def test_raw_text(read, tokenizer):
    rows = (
        {"prompt": "Human: who?\n\nAssistant:", "chosen": " The mill.", "rejected": " The moon."},
        {"chosen": "Human: who?\n\nAssistant: mill <|im_end|>", "rejected": "Human: who?\n\nAssistant: milkmen"},
    )
    for row, answers in zip(rows, ((" The mill.", " The moon."), (" mill <|im_end|>", " milkmen")), strict=True):
        (pair,) = read(row, raw_text=True, template=None)
        prompt = tokenizer.encode("Human: who?\n\nAssistant:")
        assert pair.chosen_ids.tolist() == [*prompt, *tokenizer.encode(answers[0]), tokenizer.eot_id]
        assert pair.rejected_ids.tolist() == [*prompt, *tokenizer.encode(answers[1]), tokenizer.eot_id]
        assert pair.chosen_mask.tolist() == [k >= len(prompt) for k in range(len(pair.chosen_ids))]


def test_many_pairs_in_order(read, tokenizer):
    rows = [{"prompt": f"{k}?", "chosen": f"{k}.", "rejected": f"{k}!"} for k in range(1500)]
    pairs = read(*rows)
    assert len(pairs) == 1500
    assert [tokenizer.decode(pair.chosen_ids[pair.chosen_mask].tolist()) for pair in pairs[1020:1030]] == [
        f"{k}.<|im_end|>" for k in range(1020, 1030)
    ]


def test_rows_from_elsewhere(read, tokenizer):
    (pair,) = pairs_of([("here", EXPLICIT)], tokenizer, template=CHATML)
    (expected,) = read(EXPLICIT)
    assert pair.chosen_ids.tolist() == expected.chosen_ids.tolist()
    assert pairs_of([], tokenizer, template=CHATML) == []
    with pytest.raises(ValueError, match="here: expected an object, but got str"):
        pairs_of([("here", "x")], tokenizer, template=CHATML)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "expected an object, but got list"),
        ({"prompt": "a", "chosen": "b"}, "expected the keys prompt, chosen and rejected, but got prompt, chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        (
            {"prompt": "a", "chosen": "b", "rejected": " "},
            "rejected, message 0 (assistant): expected a text, but it is empty",
        ),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "chosen: expected a list of messages, but got int"),
        (
            {"chosen": "Human: a", "rejected": "Human: b"},
            "the row has no prompt, and chosen and rejected have no beginning",
        ),
        (
            {"chosen": [USER, USER], "rejected": [USER, REJECTED]},
            "chosen must go on with the assistant after the prompt, but",
        ),
        (
            {"chosen": [USER], "rejected": [USER, REJECTED]},
            "chosen must go on with the assistant after the prompt",
        ),
        ({"prompt": [CHOSEN], "chosen": "b", "rejected": "c"}, "the assistant speaks before any message of the user"),
        (
            {"prompt": [{"role": "tool", "content": "x"}], "chosen": "b", "rejected": "c"},
            "message 0: unknown role 'tool'",
        ),
    ],
)
def test_what_is_no_pair_is_told_with_its_line(read, row, message):
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2.*" + re.escape(message)):
        read(EXPLICIT, row)


def test_raw_text_that_is_none(read):
    for row, message in (
        ({"chosen": "a b", "rejected": "c d"}, "expected a text as prompt, but it is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        (EXPLICIT, "chosen: expected a text, but got list"),
    ):
        with pytest.raises(ValueError, match=r"pairs\.jsonl:1.*" + re.escape(message)):
            read(row, raw_text=True)


def test_a_template_that_refuses_names_the_line(read):
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: the model's chat template fails: no"):
        read(EXPLICIT, template="{{ raise_exception('no') }}")


def test_files_of_another_kind(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a\.txt: preference pairs are read from \.jsonl"):
        read_preferences([str(tmp_path / "a.txt")], tokenizer, template=CHATML)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_preferences([str(tmp_path / "b.jsonl")], tokenizer, template=CHATML)
