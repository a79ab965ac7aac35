"""What callers may pass as prompts, as lists of ids, and their way into a cache. B batch, V vocabulary."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from grist_model.attention import KVCache
    from grist_model.config import ModelConfig
    from grist_model.transformer import Transformer


def as_prompts(ids: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> tuple[list[list[int]], bool]:
    """-> (prompts, whether it was one prompt rather than a batch)."""
    listed: list[Any] = ids.tolist() if hasattr(ids, "tolist") else list(ids)  # pyright: ignore
    if not listed:
        raise ValueError("the prompt is empty: a model needs at least one id to start from, such as the end-of-text id")
    single = not hasattr(listed[0], "__len__")
    prompts = [_as_ids(prompt) for prompt in ([listed] if single else listed)]
    return prompts, single


def _as_ids(prompt: Any) -> list[int]:
    if len(prompt) == 0:
        raise ValueError("a prompt of the batch is empty: every one needs at least one id")
    try:
        return [operator.index(token) for token in prompt]  # NumPy integers and one-element tensors too, no floats
    except TypeError as error:
        raise ValueError("prompts must be sequences of integer ids, or a batch of such sequences") from error


def check_prompts(config: ModelConfig, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raises ValueError for a prompt that leaves no room for max_new_tokens, or ids outside the vocabulary."""
    context, vocab = config.context_length, config.vocab_size
    longest = max(map(len, prompts))
    if longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} ids and max_new_tokens={max_new_tokens} exceed the context_length of {context}: "
            "shorten the prompt or ask for fewer"
        )
    strays = [token for prompt in prompts for token in prompt if not 0 <= token < vocab]
    if strays:
        raise ValueError(f"prompt id {strays[0]} is outside the model's vocabulary of {vocab}: is this its tokenizer?")


def prefill(model: Transformer, prompts: list[list[int]], more_slots: int) -> tuple[KVCache, Tensor]:
    """-> (a cache that holds the prompts and has more_slots of room, the logits after each prompt (B, V))."""
    import torch

    from grist_model.attention import KVCache

    device = model.embedding.weight.device
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    cache = KVCache(model.config, len(prompts), longest + more_slots, device, rollback=0)
    ids_BT = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    lengths_B = None if min(lengths) == longest else torch.tensor(lengths, device=device)
    return cache, model(ids_BT, cache=cache, lengths_B=lengths_B)[:, -1]
