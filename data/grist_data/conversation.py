"""Rows of other people's chat data to conversations: messages of the roles system, user and assistant.

    {"messages": [{"role": "user", "content": "..."}, ...]}                 chat, as OpenAI and TRL write it
    {"conversations": [{"from": "human", "value": "..."}, ...]}             ShareGPT
    {"instruction": "...", "input": "...", "output": "..."}                 Alpaca

What a row is, is seen row by row. The first two may also have a "system" of the row, a message before the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from grist_data.atomic import canonical_json
from grist_data.document import REPLACEMENT, Document, valid_text

Message = dict[str, str]

COLUMNS = (
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "system",
    "tools",
    "history",
)  # that rows may have
_LISTS = ("messages", "conversations")
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_SPELLINGS = (("role", "content"), ("from", "value"))
# Of a message: what a template would need beside the text, and what would be lost without it.
_NOT_TAKEN = ("tool_calls", "function_call", "thinking", "reasoning_content")


def conversation_of(row: object, where: str, errors: str = "strict", replaced: int = 0) -> Document:
    """The conversation of a row; its text is the canonical JSON of the messages.

    where: file and row, for messages. errors: 'replace' puts U+FFFD for what UTF-8 cannot hold. replaced: characters of the row
    that stand for what was not UTF-8. Raises ValueError, naming `where`, for a row of no known kind, an unknown role, contents
    that are no text or empty, and a conversation in which no answer follows a message of the user.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object, but got {type(row).__name__}")
    named = next((name for name in _LISTS if row.get(name) is not None), None)
    if named is not None:
        messages = messages_of(row[named], f"{where}: {named}", errors)
        if row.get("tools"):
            raise ValueError(f"{where}: tools cannot be told to a model here: leave such rows out")
    elif row.get("instruction") is not None and "output" in row:
        messages = _alpaca(row, where, errors)
    else:
        raise ValueError(
            f"{where}: expected messages (role, content), conversations (from, value), or instruction and output, but got the"
            f" keys {', '.join(map(str, row)) or '(none)'}"
        )
    if system := row.get("system"):
        if messages[0]["role"] == "system":
            raise ValueError(f"{where}: the row has a system text, and its first message is one, too: leave one out")
        messages.insert(0, {"role": "system", "content": _content(system, f"{where}: system", errors)})
    check_order(messages, where)
    document = document_of(messages, where, "conversations")
    if errors == "replace" and (marks := document.text.count(REPLACEMENT)):
        halves = marks - json.dumps(row, ensure_ascii=False).count(REPLACEMENT)
        document = document._replace(replaced=min(replaced, marks) + max(halves, 0))
    return document


def document_of(messages: Sequence[Message], where: str, source: str) -> Document:
    """Whatever decides by the text of a document (split, copies) decides by the canonical JSON of these."""
    return Document(canonical_json([*messages]).decode(), where, source, messages=tuple(messages))


def messages_of(found: object, where: str, errors: str = "strict") -> list[Message]:
    """Messages of a list in either spelling. Raises ValueError for an empty list, and as `conversation_of`."""
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ValueError(f"{where}: expected a list of messages, but got {type(found).__name__} ({found!r:.60})")
    if not found:
        raise ValueError(f"{where}: expected messages, but the list is empty")
    return [_message(message, f"{where}, message {number}", errors) for number, message in enumerate(found)]


def check_order(messages: Sequence[Message], where: str) -> None:
    """Raise ValueError for a conversation without an answer, and for one that begins with it."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError(f"{where}: no message of the assistant: there is nothing to learn from")
    if "user" not in roles[: roles.index("assistant")]:
        raise ValueError(f"{where}: the assistant speaks before any message of the user: leave its first message out")


def _message(message: object, where: str, errors: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: expected an object, but got {type(message).__name__}")
    spelling = next((keys for keys in _SPELLINGS if message.get(keys[0]) is not None), None)
    if spelling is None:
        raise ValueError(
            f"{where}: expected the keys role and content, or from and value, but got {', '.join(map(str, message))}"
        )
    role, content = (message.get(key) for key in spelling)
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"{where}: unknown role {role!r}: expected one of {', '.join(_ROLES)}")
    if lost := [key for key in _NOT_TAKEN if message.get(key)]:
        raise ValueError(
            f"{where}: {', '.join(lost)} cannot be used: write it into {spelling[1]}, or leave the row out"
        )
    return {"role": _ROLES[role], "content": _content(content, f"{where} ({role})", errors)}


def _content(value: Any, where: str, errors: str) -> str:
    text = valid_text(value, where, errors)
    if not text or text.isspace():
        raise ValueError(f"{where}: expected a text, but it is empty")
    return text


def _alpaca(row: Mapping[str, Any], where: str, errors: str) -> list[Message]:
    """The instruction, and below it the input where there is one, is what the user says."""
    if row.get("history"):
        raise ValueError(f"{where}: history is not read from such rows: write the row as messages")
    asked = _content(row["instruction"], f"{where}: instruction", errors)
    if added := row.get("input"):
        asked += "\n\n" + valid_text(added, f"{where}: input", errors)
    answer = _content(row["output"], f"{where}: output", errors)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
