"""Generation with a key/value cache. B batch, T time, V vocabulary.

torch is imported inside the functions, so that `import grist_model` stays quick for command lines.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from grist_model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How the next id is drawn from the logits. The filters apply in the order of the fields, as in transformers."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, but is {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 (or None), but is {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] (or None), but is {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1] (or None), but is {self.min_p}")


def generate(
    model: Transformer,
    ids: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_ids: Iterable[int] = (),
    seed: int | None = None,
) -> Any:
    """Continue a prompt: a sequence of ids (or a (T,) tensor) -> list of the new ids.

    Or a batch: sequences of ids, of equal length or not, or a (B, T) tensor -> a list per prompt. A row ends after
    max_new_tokens or with the first id of stop_ids, which is part of the result.

    temperature 0 takes the most likely id; otherwise logits are divided by it, then cut to the top_k best, then to the
    smallest set that holds top_p of the probability (Holtzman et al., 2020), then to those with at least min_p of the
    best one's probability (Nguyen et al., 2024). seed: the same seed gives the same ids on the same device; None draws
    one.

    Raises ValueError for an empty prompt, ids outside the vocabulary, options out of range, or a prompt that with
    max_new_tokens exceeds config.context_length.
    """
    prompts, single = _as_prompts(ids)
    rows: list[list[int]] = [[] for _ in prompts]
    for new in _steps(model, prompts, max_new_tokens, Sampling(temperature, top_k, top_p, min_p), stop_ids, seed):
        for row, token in zip(rows, new, strict=True):
            if token is not None:
                row.append(token)
    return rows[0] if single else rows


def stream(
    model: Transformer,
    ids: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_ids: Iterable[int] = (),
    seed: int | None = None,
) -> Iterator[int]:
    """The ids of `generate` for one prompt, each as soon as it is drawn. Arguments are checked at the first `next`."""
    prompts, single = _as_prompts(ids)
    if not single:
        raise ValueError(f"stream takes one prompt, a sequence of ids, but got a batch of {len(prompts)}; use generate")
    for new in _steps(model, prompts, max_new_tokens, Sampling(temperature, top_k, top_p, min_p), stop_ids, seed):
        assert new[0] is not None
        yield new[0]


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """(B, V) logits of any floating type -> (B,) int64 ids."""
    import torch

    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        worst_kept_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < worst_kept_B1, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        logits_BV = _keep_top_p(logits_BV, sampling.top_p)
    p_BV = logits_BV.softmax(-1)
    if sampling.min_p:
        p_BV = p_BV.masked_fill(p_BV < sampling.min_p * p_BV.amax(-1, keepdim=True), 0.0)
    return torch.multinomial(p_BV, 1, generator=generator).squeeze(1)


def _keep_top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    sorted_BV, order_BV = logits_BV.sort(-1, descending=True)
    p_BV = sorted_BV.softmax(-1)
    # Dropped where the better ones alone already hold top_p; the best is always kept.
    drop_BV = p_BV.cumsum(-1) - p_BV >= top_p
    return logits_BV.masked_fill(drop_BV.scatter(-1, order_BV, drop_BV), float("-inf"))


def _as_prompts(ids: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> tuple[list[list[int]], bool]:
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


def _check(model: Transformer, prompts: list[list[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, but is {max_new_tokens}")
    context, vocab = model.config.context_length, model.config.vocab_size
    longest = max(map(len, prompts))
    if longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} ids and max_new_tokens={max_new_tokens} exceed the context_length of {context}: "
            "shorten the prompt or ask for fewer"
        )
    strays = [token for prompt in prompts for token in prompt if not 0 <= token < vocab]
    if strays:
        raise ValueError(f"prompt id {strays[0]} is outside the model's vocabulary of {vocab}: is this its tokenizer?")


def _steps(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Iterable[int],
    seed: int | None,
) -> Iterator[list[int | None]]:
    """Each step's new id of every prompt; None for those that have ended."""
    import torch

    from grist_model.attention import KVCache

    _check(model, prompts, max_new_tokens)
    stops = frozenset(stop_ids)
    device = model.embedding.weight.device
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    cache = KVCache(model.config, len(prompts), longest + max_new_tokens, device)
    ids_BT = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    lengths_B = None if min(lengths) == longest else torch.tensor(lengths, device=device)
    ended = [False] * len(prompts)
    for step in range(max_new_tokens):
        # Entered anew at every step: a generator must not leave gradients off in its caller between two ids.
        # no_grad, not inference_mode, whose tensors FSDP would keep and later fail to train on.
        with torch.no_grad():
            logits_BV = model(ids_BT, cache=cache, lengths_B=lengths_B if step == 0 else None)[:, -1]
            new_B = sample(logits_BV, sampling, generator)
        ids_BT = new_B[:, None]
        drawn = new_B.tolist()
        yield [None if over else token for token, over in zip(drawn, ended, strict=True)]
        ended = [over or token in stops for token, over in zip(drawn, ended, strict=True)]
        if all(ended):
            return
