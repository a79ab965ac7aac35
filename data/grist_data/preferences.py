"""Pairs of a better and a worse answer, for preference training such as DPO (Rafailov et al. 2023), from JSON lines.

    {"prompt": "Who grinds?", "chosen": "The mill.", "rejected": "Nobody."}
    {"prompt": [{"role": "user", ...}], "chosen": [{"role": "assistant", ...}], "rejected": [...]}
    {"chosen": [{"role": "user", ...}, ...], "rejected": [the same beginning, ...]}

These are the forms of TRL. Texts are turns of a conversation (prompt: the user; chosen, rejected: the assistant) and are
written by the chat template, as messages are. With `raw_text` they are what they are, prompt and answer one behind the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from grist_data.chat_template import Tokens, encode_conversations, layouts_of
from grist_data.conversation import Message, check_order, messages_of
from grist_data.document import valid_text
from grist_data.sources import files, remote
from grist_data.sources.text_files import Part, json_rows
from grist_data.tokenizer import Tokenizer

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_ROWS_AT_ONCE = 1024  # a batch for the tokenizer
_Sequence = TypeVar("_Sequence", str, list[Message])
_SAME = "chosen and rejected are the same: there is no preference in it"


@dataclass(frozen=True)
class PreferencePair:
    """Prompt and answer, twice. ids: (n,) int64, of both together. mask: (n,) bool, the tokens that the answer is made of."""

    chosen_ids: np.ndarray
    chosen_mask: np.ndarray
    rejected_ids: np.ndarray
    rejected_mask: np.ndarray


def read_preferences(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    raw_text: bool = False,
    cache_dir: str | None = None,
) -> list[PreferencePair]:
    """All pairs of the files, in order.

    paths: .jsonl, .jsonl.gz or .jsonl.zst: files, directories, globs, addresses. template: Jinja; None for the tokenizer's own.
    raw_text: texts without a template, the end-of-text id after the answer. cache_dir: for copies of files at addresses.
    Raises FileNotFoundError for a path that matches nothing, ValueError naming file and line for a row that is no such pair,
    or whose conversation the template refuses.
    """
    rows = ((where, row) for where, row, _ in _rows(paths, cache_dir))
    return pairs_of(rows, tokenizer, template=template, raw_text=raw_text)


def pairs_of(
    rows: Iterable[tuple[str, Any]], tokenizer: Tokenizer, *, template: str | None = None, raw_text: bool = False
) -> list[PreferencePair]:
    """The pairs of rows that are there already: (where from, for errors; the row). Else as `read_preferences`."""
    found, rest = [], iter(rows)
    while batch := list(itertools.islice(rest, _ROWS_AT_ONCE)):
        found += _pairs(batch, tokenizer, template, raw_text)
    return found


def _rows(paths: Sequence[str], cache_dir: str | None) -> Iterator[tuple[str, Any, int]]:
    for name in files.find(tuple(paths)):
        if not name.lower().endswith(_SUFFIXES):
            raise ValueError(f"{name}: preference pairs are read from {', '.join(_SUFFIXES)}")
        path = remote.local_copy(name, cache_dir) if remote.is_remote(name) else Path(name)
        yield from json_rows(Part(path, name), "strict")


def _pairs(
    rows: Sequence[tuple[str, Any]], tokenizer: Tokenizer, template: str | None, raw_text: bool
) -> list[PreferencePair]:
    if raw_text:
        tokens = _raw_tokens([_raw_pair(row, where) for where, row in rows], tokenizer)
    else:
        tokens = _chat_tokens(rows, tokenizer, template)
    return [PreferencePair(*tokens[k], *tokens[k + 1]) for k in range(0, len(tokens), 2)]


def _chat_tokens(rows: Sequence[tuple[str, Any]], tokenizer: Tokenizer, template: str | None) -> list[Tokens]:
    """Of the chosen and the rejected conversation of each row in turn."""
    layouts = layouts_of(tokenizer, template)
    conversations = []
    for where, row in rows:
        prompt, chosen, rejected = _chat_pair(row, where)
        for answer in (chosen, rejected):
            conversations.append(([*prompt, *answer], len(prompt)))
            check_order(conversations[-1][0], where)
    places = [where for where, _ in rows for _ in range(2)]
    return encode_conversations(layouts, conversations, tokenizer.encode_batch, places)


def _chat_pair(row: object, where: str) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected answer of a row."""
    chosen, rejected = (_turns(value, "assistant", f"{where}: {name}") for name, value in _answers(row, where).items())
    if chosen == rejected:
        raise ValueError(f"{where}: {_SAME}")
    given = row.get("prompt") if isinstance(row, Mapping) else None
    shared = _shared(chosen, rejected)
    prompt = shared if given is None else _turns(given, "user", f"{where}: prompt")
    if not prompt:
        raise ValueError(
            f"{where}: the row has no prompt, and chosen and rejected have no beginning in common: give the prompt, or, for"
            " texts that hold both sides of a dialogue, raw_text"
        )
    if (
        given is None or shared[-len(prompt) :] == prompt
    ):  # whole conversations, that may stand beside their own prompt, too
        prompt, chosen, rejected = shared, chosen[len(shared) :], rejected[len(shared) :]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0]["role"] != "assistant":
            found = answer[0]["role"] if answer else "nothing"
            raise ValueError(f"{where}: {name} must go on with the assistant after the prompt, but there is {found}")
    return prompt, chosen, rejected


def _shared(one: _Sequence, other: _Sequence) -> _Sequence:
    """What both begin with."""
    n = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:n]  # pyright: ignore[reportReturnType] - a slice is of the same kind


def _answers(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object, but got {type(row).__name__}")
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise ValueError(
                f"{where}: expected the keys prompt, chosen and rejected, but got {', '.join(row) or 'none'}"
            )
    return {name: row[name] for name in ("chosen", "rejected")}


def _turns(value: Any, role: str, where: str) -> list[Message]:
    """Messages as they are, or a text as one of the role. Raises ValueError for anything else."""
    return messages_of([{"role": role, "content": value}] if isinstance(value, str) else value, where)


def _raw_pair(row: object, where: str) -> tuple[str, str, str]:
    """Prompt, chosen and rejected text of a row; without a prompt it is what both begin with, up to the last white space."""
    chosen, rejected = (valid_text(value, f"{where}: {name}", "strict") for name, value in _answers(row, where).items())
    if chosen == rejected:
        raise ValueError(f"{where}: {_SAME}")
    given = row.get("prompt") if isinstance(row, Mapping) else None
    if given is None:
        n = len(_shared(chosen, rejected))
        # Whole words: the prompt ends before the white space that the first difference or the word around it follows.
        while n and not chosen[n - 1].isspace():
            n -= 1
        n = len(chosen[:n].rstrip())
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    else:
        prompt = valid_text(given, f"{where}: prompt", "strict")
    for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not text or text.isspace():
            raise ValueError(f"{where}: expected a text as {name}, but it is empty")
    return prompt, chosen, rejected


def _raw_tokens(pairs: Sequence[tuple[str, str, str]], tokenizer: Tokenizer) -> list[Tokens]:
    """The prompt is encoded by itself, since a model goes on from its ids."""
    end = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    ids = iter(tokenizer.encode_batch([text for pair in pairs for text in pair]))
    tokens = []
    for _ in pairs:
        prompt, *answers = (next(ids).astype(np.int64) for _ in range(3))
        for answer in answers:
            answer = np.append(answer, np.array(end, np.int64))
            mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
            tokens.append(Tokens(np.concatenate([prompt, answer]), mask))
    return tokens
