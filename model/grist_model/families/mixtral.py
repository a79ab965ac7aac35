"""Mixtral (Jiang et al., 2024): MixtralForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grist_model.config import ModelConfig
from grist_model.families import decoder
from grist_model.families.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = "mixtral"
REQUIRED = (*decoder.SIZES, "num_local_experts", "num_experts_per_tok")
_NAMES = decoder.ExpertNames("block_sparse_moe.gate", "block_sparse_moe.experts", gate="w1", up="w3", down="w2")


def misfit(config: ModelConfig, state: Mapping[str, Tensor] | None = None) -> str | None:
    needs = decoder.common_needs(config, state) | decoder.expert_needs(config)
    needs |= {
        "no qk_norm": config.qk_norm == "none",
        "no attention biases": not config.attention_bias,
        "router_weights chosen": config.router_weights == "chosen",
        "a window in all layers or in none": decoder.slides_everywhere(config),
    }
    return decoder.unmet("Mixtral", needs)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    common = decoder.common_to_hf(config, MODEL_TYPE, "MixtralForCausalLM")
    del common["attention_bias"]
    return (
        common
        | {
            "intermediate_size": config.expert_width,
            "num_local_experts": config.experts,
            "num_experts_per_tok": config.active_experts,
            "sliding_window": config.layer_window(0),
            "router_jitter_noise": 0.0,
            "output_router_logits": False,
            "router_aux_loss_coef": config.aux_loss_weight,
        }
        | decoder.own_section(config, *decoder.ROUTER_TRAINING)
    )


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """Raises ValueError for settings that our model does not have."""
    decoder.refuse_unsupported(config, attention_bias=False)
    window = config.get("sliding_window")
    return ModelConfig(
        **decoder.common_from_hf({"num_key_value_heads": 8, **config}, theta=1e6, context=131072, eps=1e-5)
        | ({"window": window, "window_layers": "all"} if window else {})
        | {
            "experts": config["num_local_experts"],
            "active_experts": config["num_experts_per_tok"],
            "expert_width": config["intermediate_size"],
            "aux_loss_weight": config.get("router_aux_loss_coef", 0.001),
        }
        | decoder.from_own_section(config, *decoder.ROUTER_TRAINING)
    )


def layout(config: ModelConfig) -> Layout:
    return decoder.layout(config, _NAMES)
