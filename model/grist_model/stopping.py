"""When a row of generated ids is over: a stop id, a stop string, or enough of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopRules:
    """What ends a row. strings are UTF-8 bytes; token_bytes spells ids, such as `Tokenizer.token_bytes`."""

    max_new_tokens: int
    ids: frozenset[int] = frozenset()
    strings: tuple[bytes, ...] = ()
    token_bytes: Callable[[list[int]], bytes] | None = None

    @classmethod
    def of(
        cls,
        max_new_tokens: int,
        stop_ids: Iterable[int],
        stop_strings: Sequence[str],
        token_bytes: Callable[[list[int]], bytes] | None,
    ) -> StopRules:
        """Raises ValueError for less than one token, an empty stop string, or strings without token_bytes."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, but is {max_new_tokens}")
        if isinstance(stop_strings, str):  # would be taken for a sequence of its characters
            raise ValueError(f"stop_strings must be a sequence of strings: pass [{stop_strings!r}]")
        if "" in stop_strings:
            raise ValueError("a stop string is empty: every text holds it, so nothing would be generated; leave it out")
        if stop_strings and token_bytes is None:
            raise ValueError(
                "stop_strings need token_bytes, a function from ids to the bytes they spell, "
                "such as the token_bytes of a byte-level tokenizer"
            )
        return cls(max_new_tokens, frozenset(stop_ids), tuple(text.encode() for text in stop_strings), token_bytes)


class RowEnd:
    """Watches one row. Only new ids count: a stop string that the prompt holds, or begins, ends nothing.

    Strings are looked for in bytes, across the borders of tokens. UTF-8 is self-synchronizing: the bytes of a string are
    found only where the string stands, and a character that tokens cut in two does no harm.
    """

    def __init__(self, rules: StopRules):
        self.rules = rules
        self.count = 0
        self._overlap = max(map(len, rules.strings), default=0) - 1  # bytes before the newest that may begin a match
        self._tail = b""

    def after(self, token: int) -> bool:
        """Count a new id; whether the row is over with it."""
        self.count += 1
        return self.count == self.rules.max_new_tokens or token in self.rules.ids or self._completes_string(token)

    def _completes_string(self, token: int) -> bool:
        if not self.rules.strings:
            return False
        assert self.rules.token_bytes is not None  # StopRules.of has asked for it
        text = self._tail + self.rules.token_bytes([token])
        self._tail = text[max(0, len(text) - self._overlap) :]
        return any(string in text for string in self.rules.strings)
