"""What a chat template makes of a conversation: pieces of text and special ids, and which of them the model has to say.

A template writes special tokens by name, and a user may type such a name. So contents are rendered as placeholders and put in
as plain text afterwards: what the template writes becomes special ids, what people wrote stays text.

Where an answer begins is found by rendering the messages before it with the generation prompt: all that stands between the end
of that and the answer's end-of-turn marker is what the model has to say, an opening that the generation prompt does not give
(harmony's channel, an empty thought) included.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from grist_data.chat_jinja import render
from grist_data.tokenizer import Tokenizer

TrainOn = Literal["answers", "last", "all"]

# Private-use characters: they mean nothing to a template, survive `trim` and `tojson`, and are in no ordinary text.
_OPEN, _CLOSE = "\ue0f1", "\ue0f2"
_PLACEHOLDER = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")  # what templates may call by name
_KNOWN_LAYOUTS = 4096


class Shape(NamedTuple):
    """Of a message what a template may look at: its role, and the white space that its content begins and ends with."""

    role: str
    leading: str
    trailing: str


class Piece(NamedTuple):
    """Part of a conversation that is encoded by itself.

    special: its id, where it is a special token of the template. parts: otherwise text, and numbers of messages whose content
    stands there, without the white space around it. trained: whether the model has to say it.
    """

    special: int | None
    parts: tuple[str | int, ...]
    trained: bool


@dataclass(frozen=True)
class Chat:
    """A template with what it needs of a tokenizer.

    specials: name -> id. names: what templates call bos_token and so on. stripping: names whose token swallows the white space
    before, after it. today: the date for templates that write one.
    """

    template: str
    specials: Mapping[str, int]
    names: Mapping[str, str]
    stripping: tuple[frozenset[str], frozenset[str]]
    today: datetime.datetime

    @classmethod
    def of(cls, tokenizer: Tokenizer, template: str, today: datetime.datetime) -> Chat:
        config = tokenizer.config
        names = {}
        for key in TOKEN_NAMES:
            value = config.get(key)
            names[key] = (value.get("content") if isinstance(value, dict) else value) or ""
        names["eos_token"] = names["eos_token"] or tokenizer.eot_token or ""
        added = tokenizer.definition.get("added_tokens", [])
        stripping = tuple(
            frozenset(token["content"] for token in added if token.get(side)) for side in ("lstrip", "rstrip")
        )
        return cls(template, tokenizer.special_tokens, names, (stripping[0], stripping[1]), today)

    @functools.cached_property
    def _marks(self) -> re.Pattern[str]:
        """Finds special tokens in what the template writes; the only group that matched is the name."""
        before, after = (dict.fromkeys(names, r"\s*") for names in self.stripping)
        marks = [
            f"{before.get(name, '')}(?P<_{k}>{re.escape(name)}){after.get(name, '')}"
            for k, name in enumerate(sorted(self.specials, key=len, reverse=True))
        ]
        return re.compile("|".join(marks) or r"(?!)")

    def special_in(self, text: str, start: int = 0) -> tuple[int, int, int] | None:
        """The first special token of a text: where it begins and ends, and its id."""
        match = self._marks.search(text, start)
        if match is None or match.lastgroup is None:
            return None
        return match.start(), match.end(), self.specials[match[match.lastgroup]]

    def rendered(self, shapes: Sequence[Shape], prompt: bool) -> _Rendered:
        """prompt: with the beginning of the assistant's next message."""
        messages = [
            {"role": shape.role, "content": f"{shape.leading}{_OPEN}{number}{_CLOSE}{shape.trailing}"}
            for number, shape in enumerate(shapes)
        ]
        parts = _PLACEHOLDER.split(render(self.template, messages, prompt, self.names, self.today))
        return _Rendered(parts[::2], [int(number) for number in parts[1::2]])


class _Rendered(NamedTuple):
    """Text, holder of a content, text, holder, ..., text. holders: numbers of messages; texts: one more."""

    texts: list[str]
    holders: list[int]

    def before(self, place: int) -> int | None:
        """The message whose content stands before the one at `place`."""
        return self.holders[place - 1] if place else None


class _Answer(NamedTuple):
    """Where the model's words begin, in the text before the holder at `place`, and end, in the text after it."""

    place: int
    begin: int
    end: int


class Layouts:
    """Layouts of a template, each computed once: they depend on roles and white space alone."""

    def __init__(self, chat: Chat, train_on: TrainOn = "answers") -> None:
        """Raises ValueError for an unknown `train_on`."""
        if train_on not in get_args(TrainOn):
            raise ValueError(f"train_on must be one of {', '.join(get_args(TrainOn))}, but is {train_on!r}")
        self.chat, self.train_on = chat, train_on
        self.conversation = functools.lru_cache(_KNOWN_LAYOUTS)(self._conversation)

    def _conversation(self, shapes: tuple[Shape, ...], answers_from: int = 0) -> tuple[Piece, ...]:
        """Of a whole conversation. answers_from: answers of messages before this number are not trained.

        Raises ValueError where the template does not let an answer be told from what is around it.
        """
        chat, rendered = self.chat, self.chat.rendered(shapes, prompt=False)
        answers = [number for number, shape in enumerate(shapes) if shape.role == "assistant"]
        chosen = {number for number in answers if number >= answers_from}
        if self.train_on == "last":
            chosen = {answers[-1]} & chosen if answers else set()
        found = {number: _answer(chat, rendered, shapes, number) for number in answers}
        if self.train_on != "all":
            for number in sorted(chosen):
                if isinstance(problem := found[number], str):
                    raise ValueError(
                        f"the chat template does not show what of message {number} is the answer: {problem}"
                    )
        told = {number: answer for number, answer in found.items() if isinstance(answer, _Answer)}
        trained = {told[number] for number in chosen if number in told}
        pieces = _pieces(chat, rendered, list(told.values()), trained)
        return tuple(piece._replace(trained=True) for piece in pieces) if self.train_on == "all" else tuple(pieces)

    def prompt(self, shapes: tuple[Shape, ...]) -> list[Piece]:
        """Of a conversation up to where the assistant's next message begins. Nothing of it is trained."""
        rendered = self.chat.rendered(shapes, prompt=True)
        answers = [
            _answer(self.chat, rendered, shapes, number)
            for number, shape in enumerate(shapes)
            if shape.role == "assistant"
        ]
        # An answer that cannot be told is encoded together with what is around it.
        return _pieces(self.chat, rendered, [answer for answer in answers if isinstance(answer, _Answer)], set())


def _answer(chat: Chat, rendered: _Rendered, shapes: Sequence[Shape], number: int) -> _Answer | str:
    """Where message `number`, an answer, begins and ends in the whole; or why that cannot be said."""
    if rendered.holders.count(number) != 1:
        return f"it writes that message {rendered.holders.count(number)} times"
    place = rendered.holders.index(number)
    prompt, alone = chat.rendered(shapes[:number], prompt=True), chat.rendered(shapes[: number + 1], prompt=False)
    gap, opening = rendered.texts[place], prompt.texts[-1]
    if prompt.before(len(prompt.holders)) != rendered.before(place) or not gap.startswith(opening):
        return (
            f"with the generation prompt the messages before it end with {opening[-80:]!r}, but before the answer stands"
            f" {gap[-80:]!r}"
        )
    closing = rendered.texts[place + 1]
    mark = chat.special_in(closing)
    own_mark = chat.special_in(alone.texts[-1]) if alone.holders[-1:] == [number] else None
    if mark is None or own_mark is None:
        return f"no special token follows it that could tell a model to stop, but {(closing or alone.texts[-1])[:80]!r}"
    # Harmony closes earlier answers with another token than the one that a model stops with: nothing to be learned there.
    return _Answer(place, len(opening), mark[1] if mark[2] == own_mark[2] else mark[0])


def _pieces(chat: Chat, rendered: _Rendered, answers: Sequence[_Answer], trained: set[_Answer]) -> list[Piece]:
    begins = {answer.place: answer for answer in answers}
    out: list[Piece] = []
    open_parts: list[str | int] = []
    now: _Answer | None = None

    def close() -> None:
        if parts := tuple(part for part in open_parts if part != ""):
            out.append(Piece(None, parts, now in trained))
        open_parts.clear()

    def write(text: str) -> None:
        at = 0
        while mark := chat.special_in(text, at):
            open_parts.append(text[at : mark[0]])
            close()
            out.append(Piece(mark[2], (), now in trained))
            at = mark[1]
        open_parts.append(text[at:])

    for place, text in enumerate(rendered.texts):
        at = 0
        if now is not None:
            write(text[: now.end])
            close()
            at, now = now.end, None
        if place in begins:
            write(text[at : begins[place].begin])
            close()
            at, now = begins[place].begin, begins[place]
        write(text[at:])
        if place < len(rendered.holders):
            open_parts.append(rendered.holders[place])
    close()
    return out


def end_of_turn(chat: Chat) -> int | None:
    """The special token that the template writes after an answer, which a model stops with; None where there is none.

    Raises ValueError for a template that fails.
    """
    alone = chat.rendered((Shape("user", "", ""), Shape("assistant", "", "")), prompt=False)
    mark = chat.special_in(alone.texts[-1]) if alone.holders[-1:] == [1] else None
    return None if mark is None else mark[2]
