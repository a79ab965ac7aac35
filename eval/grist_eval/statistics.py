"""Means with their standard errors, and what several tasks come to together."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

RESAMPLES = 1000


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error: sample standard deviation over sqrt(n). Of values 0 and 1 it is the binomial one,
    sqrt(p (1 - p) / (n - 1)), as lm_eval reports. None for a single value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def perplexity_and_error(log_likelihoods: Sequence[float]) -> tuple[float, float | None]:
    """exp of minus the mean, and its standard error by the bootstrap (Efron, 1979): `RESAMPLES` resamples, a fixed seed."""
    n = len(log_likelihoods)
    if n == 1:
        return _perplexity(log_likelihoods), None
    draw = random.Random(0)
    found = [_perplexity(draw.choices(log_likelihoods, k=n)) for _ in range(RESAMPLES)]
    if not all(map(math.isfinite, found)):
        return _perplexity(log_likelihoods), math.inf
    mean = math.fsum(found) / RESAMPLES
    return _perplexity(log_likelihoods), math.sqrt(math.fsum((each - mean) ** 2 for each in found) / (RESAMPLES - 1))


def _perplexity(log_likelihoods: Sequence[float]) -> float:
    try:
        return math.exp(-math.fsum(log_likelihoods) / len(log_likelihoods))
    except OverflowError:  # above 709 nats a word: a model that has diverged
        return math.inf


def centred(accuracy: float, chance: float) -> float:
    """0 for guessing, 1 for always right: (accuracy - chance) / (1 - chance) (Li et al., "DataComp-LM", 2024)."""
    return (accuracy - chance) / (1 - chance)
