"""Qwen3 (Yang et al., 2025), the dense models: Qwen3ForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grist_model.config import ModelConfig
from grist_model.families import decoder
from grist_model.families.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = "qwen3"
REQUIRED = decoder.SIZES
_SLIDING, _FULL = "sliding_attention", "full_attention"


def misfit(config: ModelConfig, state: Mapping[str, Tensor] | None = None) -> str | None:
    needs = decoder.common_needs(config, state) | {
        "dense layers (experts 0)": config.experts == 0,
        "no biases in dense layers (mlp_bias)": not config.mlp_bias,
        "qk_norm by head": config.qk_norm == "head",
    }
    return decoder.unmet("Qwen3", needs)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    windows = [config.layer_window(layer) for layer in range(config.layers)]
    return decoder.common_to_hf(config, MODEL_TYPE, "Qwen3ForCausalLM") | {
        "intermediate_size": config.expert_width,
        "use_sliding_window": any(windows),
        "sliding_window": config.window if any(windows) else None,
        # For readers without layer_types: layers from this number on slide. Exact only where those are the last ones.
        "max_window_layers": next((layer for layer, window in enumerate(windows) if window), config.layers),
        "layer_types": [_SLIDING if window else _FULL for window in windows],
    }


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """Raises ValueError for settings that our model does not have."""
    common = decoder.common_from_hf(config, context=32768)
    layers = common["layers"]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        kinds = [_SLIDING if window and layer >= first else _FULL for layer in range(layers)]
    if len(kinds) != layers or set(kinds) - {_SLIDING, _FULL}:
        raise ValueError(f"layer_types must give {_SLIDING} or {_FULL} for each of {layers} layers, but are {kinds}")
    slide = tuple(layer for layer, kind in enumerate(kinds) if kind == _SLIDING)
    if slide and not window:
        raise ValueError(f"layers {slide} slide by layer_types, but config.json has no sliding_window in use")
    windows = {"window": window, "window_layers": slide} if slide else {}
    return ModelConfig(
        **common | windows | {"experts": 0, "expert_width": config["intermediate_size"], "qk_norm": "head"}
    )


def layout(config: ModelConfig) -> Layout:
    return decoder.layout(config)
