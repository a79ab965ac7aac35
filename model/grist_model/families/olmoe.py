"""OLMoE (Muennighoff et al., 2024): OlmoeForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grist_model.config import ModelConfig
from grist_model.families import decoder
from grist_model.families.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = "olmoe"
REQUIRED = (*decoder.SIZES, "num_experts", "num_experts_per_tok")


def misfit(config: ModelConfig, state: Mapping[str, Tensor] | None = None) -> str | None:
    needs = decoder.common_needs(config, state) | decoder.expert_needs(config)
    needs |= {
        "qk_norm over the width": config.qk_norm == "width",
        "heads that fill the width": config.heads * config.attention_head_width == config.width,
        "no window": all(config.layer_window(layer) is None for layer in range(config.layers)),
    }
    return decoder.unmet("OLMoE", needs)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    common = decoder.common_to_hf(config, MODEL_TYPE, "OlmoeForCausalLM")
    del common["head_dim"]
    return (
        common
        | {
            "intermediate_size": config.expert_width,
            "num_experts": config.experts,
            "num_experts_per_tok": config.active_experts,
            "norm_topk_prob": config.router_weights == "chosen",
            "clip_qkv": None,
            "output_router_logits": False,
            "router_aux_loss_coef": config.aux_loss_weight,
        }
        | decoder.own_section(config, *decoder.ROUTER_TRAINING)
    )


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """Raises ValueError for settings that our model does not have."""
    decoder.refuse_unsupported(config, clip_qkv=None)
    return ModelConfig(
        **decoder.common_from_hf(config, context=4096, eps=1e-5)
        | {
            "experts": config["num_experts"],
            "active_experts": config["num_experts_per_tok"],
            "expert_width": config["intermediate_size"],
            "router_weights": "chosen" if config.get("norm_topk_prob", False) else "all",
            "qk_norm": "width",
            "aux_loss_weight": config.get("router_aux_loss_coef", 0.01),
        }
        | decoder.from_own_section(config, *decoder.ROUTER_TRAINING)
    )


def layout(config: ModelConfig) -> Layout:
    return decoder.layout(config)
