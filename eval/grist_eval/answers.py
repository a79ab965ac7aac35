"""What a model writes after prompts, greedily, up to one of some strings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grist_eval.completion import room_for_prompt
from grist_eval.encoding import Bos, front_ids, start_id

if TYPE_CHECKING:
    from grist_data import Tokenizer

ROWS_AT_ONCE = 32
GREEDY: Mapping[str, Any] = {"temperature": 0.0}


def encode_prompts(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, bos: Bos = "tokenizer"
) -> list[list[int]]:
    """Ids of prompts; one that leaves no room for max_new_tokens in the model's context loses its beginning.

    Raises:
        ValueError: max_new_tokens leaves no room for any prompt; an empty prompt, and the tokenizer has nothing to start from.
    """
    room = room_for_prompt(model, max_new_tokens)
    front = front_ids(tokenizer, bos)
    encoded = [[*front, *ids.tolist()][-room:] for ids in tokenizer.encode_batch(prompts)]
    return [ids or [start_id(tokenizer)] for ids in encoded]


def write_answers(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    until: Sequence[str],
    max_new_tokens: int,
    done: Callable[[int, str], None],
    *,
    sampling: Mapping[str, Any] = GREEDY,
) -> None:
    """Call done(index of a prompt, the text after it without its end) for each, in the order in which they finish.

    A text ends before an end-of-text token, before the first of the strings `until`, or after max_new_tokens. sampling: options
    of `grist_model.generate_many`.

    Raises:
        ValueError: what `grist_model.generate_many` raises.
    """
    if not prompts:
        return
    from grist_model import generate_many

    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # long ones first leave less waiting at the end
    was_training = model.training
    model.eval()
    try:
        for at, ids in generate_many(
            model,
            [prompts[i] for i in order],
            max_new_tokens=max_new_tokens,
            max_batch=ROWS_AT_ONCE,
            stop_ids=() if tokenizer.eot_id is None else (tokenizer.eot_id,),
            **_stop_strings(tokenizer, until),
            **sampling,
        ):
            done(order[at], answer_text(tokenizer, ids, until))
    finally:
        model.train(was_training)


def answer_text(tokenizer: Tokenizer, ids: Sequence[int], until: Sequence[str]) -> str:
    """Text of the ids, special tokens left out, up to the first of each string."""
    special = set(tokenizer.special_tokens.values())
    text = tokenizer.decode(id_ for id_ in ids if id_ not in special)
    for end in until:
        text = text.split(end)[0]
    return text


def _stop_strings(tokenizer: Tokenizer, until: Sequence[str]) -> dict[str, Any]:
    """What lets generation stop early. A tokenizer that is not byte-level cannot say where a string is complete: there a
    text is written to its full length, and cut after."""
    try:
        tokenizer.token_bytes([])
    except ValueError:  # what token_bytes raises for exactly this reason
        return {}
    return {"stop_strings": list(until), "token_bytes": tokenizer.token_bytes}
