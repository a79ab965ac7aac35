"""Tokens to text as they come, without ever showing half a character, or a part of what ends the text."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grist_data import Tokenizer


def text_of(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Pieces of text that join to the text of all ids.

    Byte-level tokens may end inside a character: its bytes wait for the rest, and become U+FFFD if that never comes,
    as when all ids are decoded at once. Tokens of other kinds look different beside their neighbours, so their text is
    shown word by word, when the next word has begun.
    """
    if _spells_bytes(tokenizer):
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id_ in ids:
            if piece := decoder.decode(tokenizer.token_bytes([id_])):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest
        return
    so_far: list[int] = []
    text, shown = "", 0
    for id_ in ids:
        so_far.append(id_)
        text = tokenizer.decode(so_far)
        whole_words = text.rfind(" ") + 1
        if whole_words > shown:
            yield text[shown:whole_words]
            shown = whole_words
    if text[shown:]:
        yield text[shown:]


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The text up to, and without, the first of the stops; what may become one waits until it is known."""
    held = ""
    for piece in pieces:
        held += piece
        found = [at for at in (held.find(stop) for stop in stops) if at >= 0]
        if found:
            if min(found):
                yield held[: min(found)]
            return
        ready = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        if ready:
            yield held[:ready]
            held = held[ready:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text may be the first ones of a stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _spells_bytes(tokenizer: Tokenizer) -> bool:
    try:
        tokenizer.token_bytes([])
    except ValueError:  # what token_bytes raises for a tokenizer that is not byte-level
        return False
    return True
