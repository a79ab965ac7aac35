"""From a prompt to the text that a model writes after it: shared by samples and generation scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from grist_model.generate import Sampling

if TYPE_CHECKING:
    from grist_data import Tokenizer

GREEDY = Sampling(temperature=0.0)


def describe(sampling: Sampling) -> str:
    """For a heading: `greedy`, or the temperature and the filters in use."""
    if sampling.temperature == 0:
        return "greedy"
    used = {name.replace("_", "-"): value for name, value in asdict(sampling).items() if value is not None}
    return ", ".join(f"{name} {value}" for name, value in used.items())


def prompt_ids(tokenizer: Tokenizer, prompt: str, room: int) -> list[int]:
    """Ids of a prompt, its last ones where it has more than `room`, after the marker that begins documents in training.

    A model with a begin-of-text token has seen it in front of every document. One without has seen documents follow an
    end-of-text token, so an empty prompt becomes that.

    Raises:
        ValueError: the prompt is empty and the tokenizer has neither token.
    """
    ids = tokenizer.encode(prompt)
    if tokenizer.bos_id is not None:
        return [tokenizer.bos_id, *ids[max(0, len(ids) - room + 1) :]]
    if ids:
        return ids[-room:]
    if tokenizer.eot_id is None:
        raise ValueError("the prompt is empty and the tokenizer has no end-of-text token to start from: pass a prompt")
    return [tokenizer.eot_id]


def chat_ids(tokenizer: Tokenizer, prompt: str, room: int) -> list[int]:
    """Ids of a conversation by the tokenizer's chat template, up to where the answer to `prompt`, a user's message, begins.

    Raises:
        ValueError: the tokenizer has no chat template, or they are more than `room`: cut, a conversation is none.
    """
    from grist_data.chat_template import conversation_ids

    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template to put a message into")
    ids = conversation_ids(tokenizer, tokenizer.chat_template, [{"role": "user", "content": prompt}])
    if len(ids) > room:
        raise ValueError(f"the message {prompt!r} is {len(ids)} tokens with its template, but there is room for {room}")
    return ids


def complete(
    model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    seed: int | None,
    chat: bool = False,
) -> list[str]:
    """What the model writes after each prompt, up to an end-of-text token or `max_new_tokens` tokens; one batch.

    A prompt too long for the context keeps its end. With `chat`, what it answers to each prompt as a user's message, up to the
    end of its turn.

    Raises:
        ValueError: `max_new_tokens` is below 1 or leaves no room for a prompt in the model's context; what `chat_ids` raises.
    """
    from grist_data.chat_template import stop_ids as ends_of_turn
    from grist_model import generate

    room = room_for_prompt(model, max_new_tokens)
    ids = [(chat_ids if chat else prompt_ids)(tokenizer, prompt, room) for prompt in prompts]
    if chat:
        stop_ids = tuple(sorted(ends_of_turn(tokenizer)))
    else:
        stop_ids = () if tokenizer.eot_id is None else (tokenizer.eot_id,)
    new_ids = generate(model, ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids, seed=seed, **asdict(sampling))
    rows = cast("list[list[int]]", new_ids)  # a batch of prompts gives a batch of rows
    return [tokenizer.decode(new[:-1] if new[-1] in stop_ids else new) for new in rows]


def room_for_prompt(model, max_new_tokens: int) -> int:
    """How many prompt tokens the context holds beside `max_new_tokens` new ones.

    Raises:
        ValueError: there is no room for a prompt of one token, or nothing is to be written.
    """
    context = model.config.context_length
    if not 1 <= max_new_tokens < context:
        raise ValueError(
            f"the number of new tokens must be 1 to {context - 1}, one less than the model's context of {context}, "
            f"got {max_new_tokens}"
        )
    return context - max_new_tokens
