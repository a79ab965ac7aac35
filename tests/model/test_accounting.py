from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grist_kernels import backend
from grist_model import ModelConfig, YarnConfig, accounting, build

GPT_OSS_20B = ModelConfig(
    vocab_size=201088,
    context_length=131072,
    layers=24,
    width=2880,
    heads=64,
    kv_heads=8,
    head_width=64,
    window=128,
    experts=32,
    active_experts=4,
    expert_width=2880,
    yarn=YarnConfig(factor=32.0, original_context=4096),
)
GPT_OSS_120B = ModelConfig(**{**vars(GPT_OSS_20B), "layers": 36, "experts": 128})


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [(GPT_OSS_20B, 20.91e9, 3.61e9), (GPT_OSS_120B, 116.83e9, 5.13e9)],
    ids=["20b", "120b"],
)
def test_published_sizes(config, total, active):
    """The figures of the GPT-OSS model card."""
    assert accounting.parameters(config) == pytest.approx(total, abs=0.006e9)
    assert accounting.active_parameters(config) == pytest.approx(active, abs=0.006e9)
    model = build(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == accounting.parameters(config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts": 0},
        {"tied_embeddings": True, "attention_bias": False, "sinks": False},
        {"mlp_bias": False, "router_bias": False, "shared_expert_width": 12},
        {"experts": 0, "activation": "gelu", "norm": "layer", "positions": "learned", "yarn": None},
        {"qk_norm": "head"},
        {"qk_norm": "width", "router_weights": "all"},
    ],
)
def test_parameters_are_counted_to_the_last(tiny, changes):
    config = tiny(**changes)
    assert accounting.parameters(config) == sum(p.numel() for p in build(config, device="meta").parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"active_experts": 4, "shared_expert_width": 8},
        {"active_experts": 4, "window": 6, "window_layers": "alternate"},
        {"active_experts": 4, "window": 5, "window_layers": (1,), "tied_embeddings": True},
        {"experts": 0},
        {"experts": 0, "window": 6, "window_layers": "all", "heads": 4, "kv_heads": 1},
        {"experts": 0, "activation": "gelu", "mlp_bias": False},
    ],
)
def test_flops_against_the_counter_of_pytorch(tiny, changes):
    """The reference computes every score and every expert; with the formula given the same, the counts are equal."""
    T = 24
    config = tiny(**{"sinks": False, "window": None, "layers": 2, **changes})
    model = build(config)
    ids = torch.zeros(2, T, dtype=torch.int64)
    with backend.using("reference"), FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    invisible = sum(T - accounting.mean_visible_keys(T, config.layer_window(layer)) for layer in range(config.layers))
    all_keys_are_visible = 12.0 * config.heads * config.attention_head_width * invisible
    expected = (accounting.flops_per_token(config, T) + all_keys_are_visible) * ids.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


def test_only_the_chosen_experts_count(tiny):
    """What a CPU runs multiplies the rows of the chosen experts alone, in `addmm`; attention is counted apart."""
    T = 24
    config = tiny(experts=4, active_experts=2, layers=2, window=8)
    model = build(config)
    ids = torch.randint(config.vocab_size, (2, T))
    with backend.using("auto"), FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    visible = sum(accounting.mean_visible_keys(T, config.layer_window(layer)) for layer in range(config.layers))
    attention = 12.0 * config.heads * config.attention_head_width * visible
    assert counted == pytest.approx((accounting.flops_per_token(config, T) - attention) * ids.numel(), rel=1e-9)


def test_visible_keys_against_counting():
    for T, window in [(1, None), (7, None), (7, 3), (7, 7), (7, 100), (5, 1)]:
        visible = [min(i + 1, window or T) for i in range(T)]
        assert accounting.mean_visible_keys(T, window) == pytest.approx(sum(visible) / T)
    with pytest.raises(ValueError, match="context_length must be at least 1"):
        accounting.mean_visible_keys(0, None)


def test_flops_of_gpt_oss_20b_know_windows_and_causality():
    assert accounting.flops_per_token(GPT_OSS_20B, 4096) == pytest.approx(22.9e9, rel=0.005)
    everywhere = ModelConfig(**{**vars(GPT_OSS_20B), "window": None})
    assert accounting.flops_per_token(everywhere, 4096) > accounting.flops_per_token(GPT_OSS_20B, 4096)


def test_cache_bytes():
    assert accounting.kv_bytes_per_token(GPT_OSS_20B) == 2 * 24 * 8 * 64 * 2
    assert accounting.kv_bytes_per_token(GPT_OSS_20B, bytes_per_value=4) == 2 * 24 * 8 * 64 * 4
