"""Llama (Touvron et al., 2023) and what is written as it, such as SmolLM2: LlamaForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grist_model.config import ModelConfig
from grist_model.families import decoder
from grist_model.families.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = "llama"
REQUIRED = decoder.SIZES


def misfit(config: ModelConfig, state: Mapping[str, Tensor] | None = None) -> str | None:
    needs = decoder.common_needs(config, state) | {
        "dense layers (experts 0)": config.experts == 0,
        "no window": all(config.layer_window(layer) is None for layer in range(config.layers)),
        "no qk_norm": config.qk_norm == "none",
    }
    return decoder.unmet("Llama", needs)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return decoder.common_to_hf(config, MODEL_TYPE, "LlamaForCausalLM") | {
        "intermediate_size": config.expert_width,
        "mlp_bias": config.mlp_bias,
        "pretraining_tp": 1,
    }


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """Raises ValueError for settings that our model does not have."""
    return ModelConfig(
        **decoder.common_from_hf(config)
        | {
            "experts": 0,
            "expert_width": config["intermediate_size"],
            "mlp_bias": bool(config.get("mlp_bias", False)),
        }
    )


def layout(config: ModelConfig) -> Layout:
    return decoder.layout(config)
