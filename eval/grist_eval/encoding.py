"""From (context, continuation) texts to the ids that a model reads and the ids that it is asked about.

The border is the trap: tokens may run across it. As in EleutherAI's lm_eval (api/model.py, `TemplateLM._encode_pair`), spaces
at the end of the context go to the continuation, both are encoded together, and the ids of the context alone say where the
continuation begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from grist_data import Tokenizer

# Whether a begin-of-text token goes in front of a context: where the tokenizer's own files put one, or in any case, or not.
Bos = Literal["tokenizer", "always", "never"]


class Encoded(NamedTuple):
    """ids: context and continuation; the last `scored` of them are the continuation, and there is at least one before."""

    ids: list[int]
    scored: int


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], context_length: int, bos: Bos = "tokenizer"
) -> list[Encoded]:
    """Encode (context, continuation) pairs for a model that reads at most `context_length` ids.

    What is too long loses its beginning. An empty context becomes the token that documents begin with, or else the one that
    they end with.

    Raises:
        ValueError: a continuation that has no tokens of its own or more than the model can read; an empty context, and the
            tokenizer has no such token; bos "always", and it has no begin-of-text token.
    """
    front = front_ids(tokenizer, bos)
    moved = [_move_spaces(context, continuation) for context, continuation in pairs]
    texts = list(dict.fromkeys(text for context, continuation in moved for text in (context, context + continuation)))
    ids = dict(zip(texts, (array.tolist() for array in tokenizer.encode_batch(texts)), strict=True))
    encoded = []
    for context, continuation in moved:
        whole = ids[context + continuation]
        before = front if context else [] if whole[:1] == [start_id(tokenizer)] else [start_id(tokenizer)]
        scored = len(whole) - (len(ids[context]) if context else 1 - len(before))
        if not 1 <= scored <= context_length:
            raise ValueError(
                f"the continuation {continuation!r} is {scored} tokens after {context[-40:]!r}, "
                f"but must be 1 to {context_length}, what the model can read"
            )
        encoded.append(Encoded([*before, *whole][-(context_length + 1) :], scored))
    return encoded


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def front_ids(tokenizer: Tokenizer, bos: Bos = "tokenizer") -> list[int]:
    """What goes in front of every context that is not empty: the begin-of-text id or nothing.

    Raises:
        ValueError: bos "always", and the tokenizer has no begin-of-text token.
    """
    if bos == "always" and tokenizer.bos_id is None:
        raise ValueError("bos 'always' needs a begin-of-text token, but tokenizer_config.json names no bos_token")
    if tokenizer.bos_id is None or bos == "never":
        return []
    return [tokenizer.bos_id] if bos == "always" or _puts_bos(tokenizer) else []


def _puts_bos(tokenizer: Tokenizer) -> bool:
    """What transformers does with the same files: add_bos_token where it is set, else the post-processor decides."""
    configured = tokenizer.config.get("add_bos_token")
    if configured is not None:
        return bool(configured)
    import tokenizers

    engine = tokenizers.Tokenizer.from_str(tokenizer.json_bytes.decode())
    return engine.encode("", add_special_tokens=True).ids[:1] == [tokenizer.bos_id]


def start_id(tokenizer: Tokenizer) -> int:
    """What a text without a context begins with: the begin-of-text id, or the end-of-text id.

    Raises:
        ValueError: the tokenizer has neither.
    """
    start = tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id
    if start is None:
        raise ValueError("the context is empty and the tokenizer has no begin- or end-of-text token to start from")
    return start


def rolling_windows(ids: Sequence[int], start: int, context_length: int) -> Iterator[Encoded]:
    """A whole text as windows in which every id is scored once, the first one after `start`.

    The last window reaches back over ids that are scored already, so that it is as long as the model reads (lm_eval/utils.py,
    `get_rolling_token_windows` with context_len 1).
    """
    whole = [start, *ids]
    done = 1
    while done < len(whole):
        end = min(done + context_length, len(whole))
        yield Encoded(whole[max(0, end - context_length - 1) : end], end - done)
        done = end
