"""The unit of text, and what a source can be divided into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Document(NamedTuple):
    """One text. `id` says where it is from in messages; what decides its split is the text itself.

    replaced: how many characters of it are U+FFFD because the source could not read what stood there.
    messages: of a conversation, {"role", "content"} each; its `text` is the canonical JSON of them. None for plain text.
    """

    text: str
    id: str
    source: str = ""
    replaced: int = 0
    messages: tuple[dict[str, str], ...] | None = None

    @property
    def prose(self) -> str:
        """What people wrote: the text, or the contents of the messages with an empty line between."""
        if self.messages is None:
            return self.text
        return "\n\n".join(message["content"] for message in self.messages)


@dataclass(frozen=True)
class Piece:
    """Part of a source that can be read without what is before it.

    name: of the file, or of the whole. start, stop: where it begins and ends in that, in what the source counts there (bytes,
    groups of rows, rows); stop None: at its end. size: its bytes as they are stored, about.
    """

    name: str
    start: int = 0
    stop: int | None = None
    size: int = 0


def valid_text(value: object, where: str, errors: str) -> str:
    """A string that UTF-8 can hold: JSON's \\ud800 escapes make strings that it cannot. Raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a text, but got {type(value).__name__} ({value!r:.60})")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        if errors == "replace":
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise ValueError(f"{where}: {value[error.start]!r} is half of a UTF-16 pair; use errors=replace") from error
    return value
