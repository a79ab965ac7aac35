"""Prompts for tests of generation."""

from __future__ import annotations

import random


def random_prompts(count: int, *, longest: int, vocab_size: int = 97) -> list[list[int]]:
    """`count` prompts of one to `longest` ids, always the same. 97: the vocabulary of the models in tests/model."""
    rng = random.Random(0)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(count)]
