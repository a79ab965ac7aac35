from __future__ import annotations

import pytest

from grist_model import ModelConfig, RopeScaling, YarnConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, "heads must be a multiple of kv_heads"),
        ({"width": 250, "heads": 4}, "width 250 is not divisible by heads 4"),
        ({"head_width": 33}, "head_width must be even"),
        ({"experts": 4, "active_experts": 5}, r"active_experts must be between 1 and experts \(4\), but is 5"),
        ({"active_experts": 0}, "active_experts must be between 1"),
        ({"experts": -1}, "experts must be 0"),
        ({"experts": 0, "shared_expert_width": 8}, "shared_expert_width needs experts"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"window": 0}, "window counts the token itself"),
        ({"window_layers": "odd"}, "window_layers must be one of alternate, all, none"),
        ({"balance": "luck"}, "balance must be one of aux, bias, none"),
        ({"swiglu_limit": 0.0}, "swiglu_limit must be greater than 0"),
        ({"norm_eps": 0.0}, "norm_eps must be greater than 0"),
        ({"aux_loss_weight": -0.1}, "aux_loss_weight must be 0 or more"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 0.5, "original_context": 16}, "yarn.factor"),
        ({"factor": 2.0, "original_context": 0}, "yarn.original_context"),
        ({"factor": 2.0, "original_context": 16, "beta_slow": 64.0}, "beta_slow < beta_fast"),
    ],
)
def test_bad_yarn_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        YarnConfig(**settings)


def test_head_width_defaults_to_an_equal_share_and_may_be_anything_even():
    assert ModelConfig(width=256, heads=4).attention_head_width == 64
    assert ModelConfig(width=250, heads=4, head_width=64).attention_head_width == 64


@pytest.mark.parametrize(
    ("window_layers", "windows"),
    [("alternate", [128, None, 128, None]), ("all", [128] * 4), ("none", [None] * 4)],
)
def test_layer_windows(window_layers, windows):
    config = ModelConfig(window_layers=window_layers)
    assert [config.layer_window(layer) for layer in range(4)] == windows
    assert [ModelConfig(window=None).layer_window(layer) for layer in range(4)] == [None] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ntk", "factor": 2.0}, "rope_scaling.kind must be one of linear, llama3, dynamic, but is 'ntk'"),
        ({"kind": "linear", "factor": 0.5}, "rope_scaling.factor"),
        ({"kind": "llama3", "factor": 8.0, "original_context": 0}, "rope_scaling.original_context"),
        (
            {"kind": "llama3", "factor": 8.0, "low_frequency_factor": 4.0},
            "low_frequency_factor < high_frequency_factor",
        ),
    ],
)
def test_bad_rope_scalings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**settings)


def test_one_way_to_extend_the_context():
    with pytest.raises(ValueError, match="cannot both be set"):
        ModelConfig(yarn=YarnConfig(2.0, 16), rope_scaling=RopeScaling("linear", 2.0))
