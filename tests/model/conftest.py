"""A small model with every feature of GPT-OSS in use, and one with every feature of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from grist_model import ModelConfig, Transformer, YarnConfig, build

TINY = ModelConfig(
    vocab_size=97,
    context_length=64,
    layers=3,
    width=32,
    heads=4,
    kv_heads=2,
    head_width=16,
    window=5,
    experts=4,
    active_experts=2,
    expert_width=24,
    yarn=YarnConfig(factor=8.0, original_context=16),
)


@pytest.fixture
def tiny() -> Callable[..., ModelConfig]:
    """tiny(field=value, ...) -> TINY with changes."""
    return lambda **changes: dataclasses.replace(TINY, **changes)


@pytest.fixture
def make_model(tiny: Callable[..., ModelConfig]) -> Callable[..., Transformer]:
    """make_model(field=value, ...) -> a tiny model in which no parameter is zero or one: none can be ignored."""

    def make(**changes) -> Transformer:
        model = build(tiny(**changes))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.5 if parameter.dim() == 1 else 0.3
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """(3, 24) ids, longer than the window."""
    return torch.randint(0, TINY.vocab_size, (3, 24), generator=torch.Generator().manual_seed(3))
