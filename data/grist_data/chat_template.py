"""A conversation to token ids by a chat template (the Jinja text that Hugging Face models carry), and what of it is trained.

    ids, trained = conversation_tokens(tokenizer, [{"role": "user", "content": "Who grinds?"}, ...])

How answers are found in what a template writes: chat_layout.py.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from grist_data.tokenizer import TEMPLATE_FILE, Tokenizer, stored_template

if TYPE_CHECKING:
    from grist_data.chat_layout import Layouts, Piece, Shape, TrainOn

Message = dict[str, str]  # {"role": "user" | "assistant" | "system", "content": text}
EncodeBatch = Callable[[Sequence[str]], Sequence[np.ndarray]]

_TEMPLATES = Path(__file__).parent / "templates"
# Name of each that is in there -> the special tokens that it writes.
SHIPPED: dict[str, tuple[str, ...]] = {"plain": (), "chatml": ("<|im_start|>", "<|im_end|>")}

# What templates that write the date are told in training data, so that the same text gives the same bytes on any day. It is
# the date that Llama 3.1's own template writes where it is told none.
TRAINING_DATE = datetime.datetime(2024, 7, 26)


class Tokens(NamedTuple):
    """A conversation. ids: (n,) int64. trained: (n,) bool, whether the token is one that the model has to say."""

    ids: np.ndarray
    trained: np.ndarray


def conversation_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    train_on: TrainOn = "answers",
    answers_from: int = 0,
) -> Tokens:
    """Ids of a whole conversation, and which of them are trained as targets.

    template: Jinja; None for the tokenizer's own. train_on: every answer, the last one, or all of the text. An answer is what
    follows the generation prompt, its end-of-turn marker included. answers_from: answers of messages before this number are
    not trained. To encode many, make `layouts_of` once and call `encode_conversations`.
    Raises ValueError for a tokenizer without template, a template that fails, refuses the conversation, or does not let an
    answer be told from what is around it.
    """
    layouts = layouts_of(tokenizer, template, train_on)
    return encode_conversations(layouts, [(messages, answers_from)], tokenizer.encode_batch)[0]


def conversation_ids(tokenizer: Tokenizer, template: str, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to where the assistant's next message begins.

    Raises ValueError: the template is not valid Jinja, or refuses this conversation.
    """
    from grist_data.chat_layout import Chat, Layouts

    layouts = Layouts(Chat.of(tokenizer, template, datetime.datetime.now()))
    pieces = layouts.prompt(_shapes(messages))
    return _encoded([(messages, pieces)], tokenizer.encode_batch)[0].ids.tolist()


def layouts_of(tokenizer: Tokenizer, template: str | None = None, train_on: TrainOn = "answers") -> Layouts:
    """For training data. Raises ValueError for a tokenizer without template where none is given."""
    from grist_data.chat_layout import Chat, Layouts

    template = tokenizer.chat_template if template is None else template
    if template is None:
        raise ValueError(
            "the tokenizer has no chat template: give one (chat_template: plain, chatml, a .jinja file, or the directory of a"
            " model that has one)"
        )
    return Layouts(Chat.of(tokenizer, template, TRAINING_DATE), train_on)


def encode_conversations(
    layouts: Layouts,
    conversations: Sequence[tuple[Sequence[Message], int]],
    encode_batch: EncodeBatch,
    places: Sequence[str] | None = None,
) -> list[Tokens]:
    """Tokens of each (messages, answers_from).

    encode_batch: ids of texts, special tokens' names as text. places: where each is from, for errors. Raises ValueError as
    `conversation_tokens`.
    """
    laid_out = []
    for number, (messages, first) in enumerate(conversations):
        try:
            laid_out.append((messages, layouts.conversation(_shapes(messages), first)))
        except ValueError as error:
            if places is None:
                raise
            raise ValueError(f"{places[number]}: {error}") from error
    return _encoded(laid_out, encode_batch)


def find_template(directory: str | Path, tokenizer: Tokenizer) -> str | None:
    """The chat template in a model directory, chat_template.jinja before the tokenizer's own, or None."""
    file = Path(directory) / TEMPLATE_FILE
    return file.read_text(encoding="utf-8") if file.is_file() else tokenizer.chat_template


def read_template(name: str) -> str:
    """The template that an option names: one of `SHIPPED`, a .jinja file, or a directory with a tokenizer that has one.

    Raises FileNotFoundError for neither, ValueError for a directory without one.
    """
    if name in SHIPPED:
        return (_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    path = Path(name).expanduser()
    if path.is_dir():
        found = stored_template(path)
        if found is None:
            raise ValueError(f"{path} has no chat template: neither {TEMPLATE_FILE} nor one in tokenizer_config.json")
        return found
    if not path.is_file():
        raise FileNotFoundError(
            f"chat_template {name!r} is neither {', '.join(SHIPPED)} nor a .jinja file or directory that exists"
        )
    return path.read_text(encoding="utf-8")


def text_without_specials(template: str, messages: Sequence[Message], special_tokens: Sequence[str]) -> str:
    """A conversation as the template writes it, without the special tokens: what a tokenizer for it is trained on.

    Raises ValueError as `conversation_tokens`.
    """
    from grist_data.chat_jinja import render
    from grist_data.chat_layout import TOKEN_NAMES

    names: dict[str, str] = dict.fromkeys(TOKEN_NAMES, "")
    text = render(template, messages, False, names, TRAINING_DATE)
    for special in special_tokens:
        text = text.replace(special, "")
    return text


def check_specials(name: str | None, tokenizer: Tokenizer) -> None:
    """Raise ValueError where the special tokens of a template that is shipped would be text to the tokenizer."""
    missing = [token for token in SHIPPED.get(name or "", ()) if token not in tokenizer.special_tokens]
    if name == "plain" and tokenizer.eot_token is None:
        missing = ["<|endoftext|>"]
    if missing:
        raise ValueError(
            f"the chat template {name!r} needs the special tokens {', '.join(missing)}, which the tokenizer does not have: add"
            " them to special_tokens of a tokenizer that is trained, or give another chat_template"
        )


def stop_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids that end the assistant's message: end of text, what tokenizer_config.json calls eos_token, and what the tokenizer's
    chat template writes after an answer. Raises ValueError for a template that fails."""
    eos = tokenizer.config.get("eos_token")
    name = eos.get("content") if isinstance(eos, dict) else eos
    ends = {tokenizer.eot_id, None if name is None else tokenizer.special_tokens.get(name)}
    if tokenizer.chat_template is not None:
        from grist_data.chat_layout import Chat, end_of_turn

        ends.add(end_of_turn(Chat.of(tokenizer, tokenizer.chat_template, TRAINING_DATE)))
    return {id_ for id_ in ends if id_ is not None}


def _shapes(messages: Sequence[Message]) -> tuple[Shape, ...]:
    from grist_data.chat_layout import Shape

    shapes = []
    for message in messages:
        content = message["content"]
        leading = content[: len(content) - len(content.lstrip())]
        shapes.append(Shape(message["role"], leading, content[len(content.rstrip()) :] if content.strip() else ""))
    return tuple(shapes)


def _encoded(
    conversations: Sequence[tuple[Sequence[Message], Sequence[Piece]]], encode_batch: EncodeBatch
) -> list[Tokens]:
    """Texts of all pieces in one batch; where text follows text, what comes before a border and the two together as well."""
    texts: dict[str, None] = {}
    of_pieces = []
    for messages, pieces in conversations:
        own = ["".join(_text(part, messages) for part in piece.parts) for piece in pieces]
        of_pieces.append(own)
        texts |= dict.fromkeys(text for k, text in enumerate(own) if pieces[k].special is None)
        texts |= dict.fromkeys(own[k - 1] + own[k] for k in _borders(pieces))
    ids = dict(zip(texts, encode_batch([*texts]), strict=True))
    return [
        _joined(pieces, own, ids) for (_, pieces), own in zip(conversations, of_pieces, strict=True)
    ]  # fmt: skip


def _text(part: str | int, messages: Sequence[Message]) -> str:
    return part if isinstance(part, str) else messages[part]["content"].strip()


def _borders(pieces: Sequence[Piece]) -> list[int]:
    """Numbers of the pieces of text that follow text: an answer's beginning, where no special token is."""
    return [k for k in range(1, len(pieces)) if pieces[k].special is None and pieces[k - 1].special is None]


def _joined(pieces: Sequence[Piece], texts: Sequence[str], ids: dict[str, np.ndarray]) -> Tokens:
    found = [
        np.array([piece.special], np.int64) if piece.special is not None else ids[text].astype(np.int64)
        for piece, text in zip(pieces, texts, strict=True)
    ]
    for k in _borders(pieces):
        # The model goes on from the ids of the prompt. Where the two texts together begin with these, the rest is what it
        # would say; a tokenizer that marks the beginning of words by what is before them needs that.
        together, before = ids[texts[k - 1] + texts[k]], ids[texts[k - 1]]
        if len(together) > len(before) and np.array_equal(together[: len(before)], before):
            found[k] = together[len(before) :].astype(np.int64)
    if not found:
        return Tokens(np.zeros(0, np.int64), np.zeros(0, bool))
    trained = [np.full(len(part), piece.trained) for part, piece in zip(found, pieces, strict=True)]
    return Tokens(np.concatenate(found), np.concatenate(trained))
