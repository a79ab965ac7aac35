"""Generation with a key/value cache. B batch, V vocabulary.

torch is imported inside the functions, so that `import grist_model` stays quick for command lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from grist_model.prompts import as_prompts, check_prompts, prefill
from grist_model.sampling import Sampling, row_generator, sample, seed_or_fresh, seen_ids
from grist_model.speculation import check_lookup, lookup_ids
from grist_model.stopping import RowEnd, StopRules

if TYPE_CHECKING:
    from torch import Tensor

    from grist_model.transformer import Transformer

__all__ = ["Sampling", "generate", "sample", "stream"]


def generate(
    model: Transformer,
    ids: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop_ids: Iterable[int] = (),
    stop_strings: Sequence[str] = (),
    token_bytes: Callable[[list[int]], bytes] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    prompt_lookup: int | None = None,
    seed: int | None = None,
) -> Any:
    """Continue a prompt: a sequence of ids (or a (T,) tensor) -> list of the new ids.

    Or a batch: sequences of ids, of equal length or not, or a (B, T) tensor -> a list per prompt. A row ends after
    max_new_tokens, with the first id of stop_ids, or with the id that completes one of stop_strings in the new text; that
    id is part of the result. stop_strings need token_bytes, from ids to the bytes they spell (`Tokenizer.token_bytes`).

    repetition_penalty makes ids of prompt and text less likely if above 1 (Keskar et al., 2019). temperature 0 takes the
    most likely id; otherwise logits are divided by it, then cut to the top_k best, then to the smallest set that holds
    top_p of the probability (Holtzman et al., 2020), then to those with at least min_p of the best one's probability
    (Nguyen et al., 2024).

    seed: the same seed gives the same ids on the same device; None draws one. Every row draws its own numbers: row r of a
    batch is what its prompt alone gives with `grist_model.sampling.row_seed(seed, r)`, which is `seed` for row 0. (A batch
    sums in another order than one prompt: where two ids are equally likely to the last bits, they can still part. And with
    "dynamic" rotary scaling the angles of all rows follow the longest.)

    on_token(row, id) is called for every id of the result as soon as it is drawn. prompt_lookup=N guesses up to N tokens a
    step from repetitions in prompt and text and verifies them in one forward pass, for one greedy prompt (Saxena, 2023):
    the same ids (but for such near ties), sooner where the text repeats.

    Raises ValueError for an empty prompt, ids outside the vocabulary, options out of range or that do not go together, or
    a prompt that with max_new_tokens exceeds config.context_length.
    """
    prompts, single = as_prompts(ids)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    rules = StopRules.of(max_new_tokens, stop_ids, stop_strings, token_bytes)
    rows: list[list[int]] = [[] for _ in prompts]
    for new in _steps(model, prompts, rules, sampling, prompt_lookup, seed):
        for row, token in enumerate(new):
            if token is not None:
                rows[row].append(token)
                if on_token is not None:
                    on_token(row, token)
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
    repetition_penalty: float | None = None,
    stop_ids: Iterable[int] = (),
    stop_strings: Sequence[str] = (),
    token_bytes: Callable[[list[int]], bytes] | None = None,
    prompt_lookup: int | None = None,
    seed: int | None = None,
) -> Iterator[int]:
    """The ids of `generate` for one prompt, each as soon as it is drawn. Arguments are checked at the first `next`."""
    prompts, single = as_prompts(ids)
    if not single:
        raise ValueError(f"stream takes one prompt, a sequence of ids, but got a batch of {len(prompts)}; use generate")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    rules = StopRules.of(max_new_tokens, stop_ids, stop_strings, token_bytes)
    for new in _steps(model, prompts, rules, sampling, prompt_lookup, seed):
        assert new[0] is not None
        yield new[0]


def _steps(
    model: Transformer,
    prompts: list[list[int]],
    rules: StopRules,
    sampling: Sampling,
    prompt_lookup: int | None,
    seed: int | None,
) -> Iterator[list[int | None]]:
    """Each step's new id of every prompt; None for those that have ended."""
    check_prompts(model.config, prompts, rules.max_new_tokens)
    if prompt_lookup is None:
        drawn = _drawn_ids(model, prompts, rules.max_new_tokens, sampling, seed)
    else:
        check_lookup(model, len(prompts), sampling, prompt_lookup)
        drawn = ([token] for token in lookup_ids(model, prompts[0], rules.max_new_tokens, prompt_lookup))
    ends: list[RowEnd | None] = [RowEnd(rules) for _ in prompts]
    for new in drawn:
        yield [None if end is None else token for token, end in zip(new, ends, strict=True)]
        ends = [None if end is None or end.after(token) else end for token, end in zip(new, ends, strict=True)]
        if not any(ends):
            return


def _drawn_ids(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling, seed: int | None
) -> Iterator[list[int]]:
    """max_new_tokens times an id of every prompt, ended or not."""
    import torch

    seed = seed_or_fresh(seed)
    device = model.embedding.weight.device
    generators = [row_generator(seed, row, device) for row in range(len(prompts))]
    seen_BV = seen_ids(prompts, sampling, model.config.vocab_size, device)
    cache, ids_B1 = None, None
    for _ in range(max_new_tokens):
        # Entered anew at every step: a generator must not leave gradients off in its caller between two ids.
        # no_grad, not inference_mode, whose tensors FSDP would keep and later fail to train on.
        with torch.no_grad():
            if cache is None or ids_B1 is None:
                cache, logits_BV = prefill(model, prompts, max_new_tokens)
            else:
                logits_BV = model(ids_B1, cache=cache)[:, -1]
            ids_B1 = sample(logits_BV, sampling, generators, seen_BV)[:, None]
            if seen_BV is not None:
                seen_BV.scatter_(1, ids_B1, True)
        yield ids_B1[:, 0].tolist()
