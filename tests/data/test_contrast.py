from __future__ import annotations

import pytest

from grist_data.contrast import contrasting_rows
from grist_data.document import Document


def conversation(number: int, answer: str | None = None) -> Document:
    messages = (
        {"role": "system", "content": "You grind."},
        {"role": "user", "content": f"question {number}"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "and then?"},
        {"role": "assistant", "content": answer or f"answer {number}"},
    )
    return Document("", f"file:{number}", messages=messages)


def test_the_last_answer_is_chosen_and_another_conversations_rejected():
    documents = [conversation(i) for i in range(20)]
    rows = list(contrasting_rows(documents))
    assert [where for where, _ in rows] == [f"file:{i}" for i in range(20)]
    for i, (_, row) in enumerate(rows):
        messages = documents[i].messages
        assert messages is not None
        assert row["prompt"] == list(messages[:4])
        assert row["chosen"] == [{"role": "assistant", "content": f"answer {i}"}]
        assert row["rejected"][0]["content"] in {f"answer {k}" for k in range(20) if k != i}
    assert len({row["rejected"][0]["content"] for _, row in rows}) == 20, "nobody's answer is everybody's"
    assert list(contrasting_rows(documents)) == rows
    assert list(contrasting_rows(documents, seed=1)) != rows


def test_an_equal_answer_is_no_rejected_one():
    documents = [conversation(i, "yes" if i else "no") for i in range(12)]
    rejected = [row["rejected"][0]["content"] for _, row in contrasting_rows(documents)]
    assert rejected[0] == "yes"
    assert set(rejected[1:]) == {"no"}


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([Document("a text", "file:7")], "file:7: preference pairs are made of conversations"),
        ([conversation(i, "yes") for i in range(5)], "fewer than two different answers"),
        ([], "fewer than two different answers"),
        ([Document("", "file:3", messages=({"role": "user", "content": "alone"},))], "file:3: no answer follows"),
    ],
)
def test_what_cannot_be_contrasted_is_refused(documents, words):
    with pytest.raises(ValueError, match=words):
        list(contrasting_rows(documents))
