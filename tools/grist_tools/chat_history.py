"""What a conversation holds so far, and what of it a model is given: it may grow longer than the context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from grist_data import Tokenizer


class History(Protocol):
    """room: the most ids a prompt may have. note: what the last `ask` left out, or ""."""

    room: int
    note: str

    def ask(self, line: str) -> list[int]:
        """Take a line and give the prompt for it. Raises ValueError, and forgets the line, where there can be none."""
        ...

    def answered(self, text: str, ids: list[int]) -> None:
        """Take what the model wrote."""
        ...

    def reset(self) -> None: ...


class Messages:
    """For a chat template. Where all turns do not fit, the oldest are forgotten, whole ones; the system message stays."""

    def __init__(self, tokenizer: Tokenizer, template: str, room: int, system: str | None = None) -> None:
        self.tokenizer, self.template, self.room, self.system = tokenizer, template, room, system
        self.reset()

    def reset(self) -> None:
        self.turns: list[dict[str, str]] = []
        self.note = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self.turns]

    def ask(self, line: str) -> list[int]:
        from grist_data.chat_template import conversation_ids

        self.turns.append({"role": "user", "content": line})
        before, self.note = len(self.turns), ""
        try:
            while len(ids := conversation_ids(self.tokenizer, self.template, self.messages)) > self.room:
                self._forget_oldest(len(ids))
        except ValueError:
            self.turns.pop()
            raise
        forgotten = before - len(self.turns)
        if forgotten:
            turns = "turn" if forgotten <= 2 else "turns"
            self.note = f"the oldest {turns} no longer fit into the context: {forgotten} messages are forgotten"
        return ids

    def _forget_oldest(self, length: int) -> None:
        starts = [at for at, message in enumerate(self.turns) if message["role"] == "user"]
        if len(starts) < 2:
            raise ValueError(
                f"that makes a prompt of {length} tokens, but only {self.room} fit beside the answer: shorten it, or ask for "
                "less with --max-new-tokens"
            )
        del self.turns[: starts[1]]

    def answered(self, text: str, ids: list[int]) -> None:
        self.turns.append({"role": "assistant", "content": text})


class GrowingText:
    """For a base model: one text that both write. Its end is what fits."""

    def __init__(self, tokenizer: Tokenizer, room: int) -> None:
        self.tokenizer, self.room = tokenizer, room
        self.reset()

    def reset(self) -> None:
        self.ids: list[int] = []
        self.note = ""

    def ask(self, line: str) -> list[int]:
        # A line typed after the model's text starts a new line of it; an empty line adds nothing.
        text = "\n" + line if line and self.ids else line
        begin = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eot_id
        ids = (self.ids or ([] if begin is None else [begin])) + self.tokenizer.encode(text)
        if not ids:
            raise ValueError("nothing to continue: the tokenizer has no end-of-text token, so type something first")
        self.ids = ids
        self.note = f"only the last {self.room} tokens fit into the context" if len(ids) > self.room else ""
        return ids[-self.room :]

    def answered(self, text: str, ids: list[int]) -> None:
        self.ids = self.ids + ids
