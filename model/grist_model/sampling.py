"""From logits to ids: temperature, filters, and random numbers that belong to a row. B batch, V vocabulary.

torch is imported inside the functions, so that `import grist_model` stays quick for command lines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next id is drawn from the logits.

    As in transformers, the repetition penalty comes first, greedy or not, then the others in the order of the fields.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, but is {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 (or None), but is {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] (or None), but is {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1] (or None), but is {self.min_p}")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                "repetition_penalty must be a finite number above 0 (1 changes nothing; or None), "
                f"but is {self.repetition_penalty}"
            )


def sample(
    logits_BV: Tensor,
    sampling: Sampling,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    seen_BV: Tensor | None = None,
) -> Tensor:
    """(B, V) logits of any floating type -> (B,) int64 ids.

    generator: one for all rows, or one for each: then a row's id depends on nothing but its logits and its generator.
    seen_BV (bool): the ids that the repetition penalty is for, needed with it.

    Raises ValueError if the probabilities are not numbers, which they are not when the logits hold NaN or +inf.
    """
    logits_BV = penalize_seen(logits_BV, sampling, seen_BV)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    p_BV = probabilities(logits_BV, sampling)
    if not bool(p_BV.isfinite().all()):
        raise ValueError("the model's logits are not numbers (NaN or infinite): no id can be drawn from them")
    # Divided by exponential noise, the largest is id v with probability p_v: what torch.multinomial does for one draw,
    # with the same numbers, but filled row by row where every row has a generator.
    return (p_BV / _exponential_noise(p_BV, generator)).argmax(-1)


def penalize_seen(logits_BV: Tensor, sampling: Sampling, seen_BV: Tensor | None) -> Tensor:
    """Logits of the ids in seen_BV divided by the repetition penalty where positive, multiplied where negative.

    Keskar et al., "CTRL", 2019, section 4.1, with the sign as transformers treats it. An id counts once, however often
    it came.
    """
    import torch

    penalty = sampling.repetition_penalty
    if penalty is None or penalty == 1:
        return logits_BV
    if seen_BV is None:
        raise ValueError("a repetition penalty needs seen_BV, the ids of prompt and text so far of each row")
    logits_BV = logits_BV.float()
    penalized_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, penalized_BV, logits_BV)


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) float32: what is drawn from, after temperature and filters. Rows with min_p need not sum to one."""
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        worst_kept_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < worst_kept_B1, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        logits_BV = _keep_top_p(logits_BV, sampling.top_p)
    p_BV = logits_BV.softmax(-1)
    if sampling.min_p:
        p_BV = p_BV.masked_fill(p_BV < sampling.min_p * p_BV.amax(-1, keepdim=True), 0.0)
    return p_BV


def _keep_top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    sorted_BV, order_BV = logits_BV.sort(-1, descending=True)
    p_BV = sorted_BV.softmax(-1)
    # Dropped where the better ones alone already hold top_p; the best is always kept.
    drop_BV = p_BV.cumsum(-1) - p_BV >= top_p
    return logits_BV.masked_fill(drop_BV.scatter(-1, order_BV, drop_BV), float("-inf"))


def _exponential_noise(p_BV: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    import torch

    noise_BV = torch.empty_like(p_BV)
    if not isinstance(generator, Sequence):
        return noise_BV.exponential_(generator=generator)
    for noise_V, own in zip(noise_BV, generator, strict=True):
        noise_V.exponential_(generator=own)
    return noise_BV


def row_seed(seed: int, row: int) -> int:
    """The seed that row `row` of a batch draws with: a prompt alone with this seed gives the row's ids. Row 0: `seed`."""
    if row == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{row}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # manual_seed wants a signed 64-bit number


def seed_or_fresh(seed: int | None) -> int:
    """The seed, or for None one that the operating system draws; torch's own generator is left alone."""
    import torch

    return torch.Generator().seed() if seed is None else seed


def row_generator(seed: int, row: int, device: torch.device) -> torch.Generator:
    import torch

    return torch.Generator(device=device).manual_seed(row_seed(seed, row))


def seen_ids(
    prompts: Sequence[Sequence[int]], sampling: Sampling, vocab_size: int, device: torch.device
) -> Tensor | None:
    """(B, V) bool: the ids of each prompt; None without a repetition penalty, which alone asks for them."""
    import torch

    if sampling.repetition_penalty is None:
        return None
    seen_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for seen_V, prompt in zip(seen_BV, prompts, strict=True):
        seen_V[list(prompt)] = True
    return seen_BV.to(device)
