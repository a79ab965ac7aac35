"""Qwen3 (Yang et al., 2025), the mixtures of experts: Qwen3MoeForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grist_model.config import ModelConfig
from grist_model.families import decoder
from grist_model.families.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = "qwen3_moe"
REQUIRED = (
    *decoder.SIZES[:-1],
    "moe_intermediate_size",
    "num_experts_per_tok",
)  # no dense layers, so no size of theirs


def misfit(config: ModelConfig, state: Mapping[str, Tensor] | None = None) -> str | None:
    needs = decoder.common_needs(config, state) | decoder.expert_needs(config)
    needs |= {
        "qk_norm by head": config.qk_norm == "head",
        "a window in all layers or in none": decoder.slides_everywhere(config),
    }
    return decoder.unmet("Qwen3-MoE", needs)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    window = config.layer_window(0)
    return (
        decoder.common_to_hf(config, MODEL_TYPE, "Qwen3MoeForCausalLM")
        | {
            "intermediate_size": config.expert_width,  # of dense layers, of which there are none
            "moe_intermediate_size": config.expert_width,
            "num_experts": config.experts,
            "num_local_experts": config.experts,  # version 5 of transformers reads either, 4.57 only the other
            "num_experts_per_tok": config.active_experts,
            "norm_topk_prob": config.router_weights == "chosen",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": 0 if window else config.layers,
            "output_router_logits": False,
            "router_aux_loss_coef": config.aux_loss_weight,
        }
        | decoder.own_section(config, *decoder.ROUTER_TRAINING)
    )


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """Raises ValueError for settings that our model does not have."""
    decoder.refuse_unsupported(config, decoder_sparse_step=1, mlp_only_layers=[])
    experts = config.get("num_experts", config.get("num_local_experts"))
    if experts is None:
        raise ValueError("config.json lacks num_experts (or num_local_experts)")
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    return ModelConfig(
        **decoder.common_from_hf({"num_key_value_heads": 4, **config}, context=32768)
        | ({"window": window, "window_layers": "all"} if window else {})
        | {
            "experts": experts,
            "active_experts": config["num_experts_per_tok"],
            "expert_width": config["moe_intermediate_size"],
            "router_weights": "chosen" if config.get("norm_topk_prob", False) else "all",
            "qk_norm": "head",
            "aux_loss_weight": config.get("router_aux_loss_coef", 0.001),
        }
        | decoder.from_own_section(config, *decoder.ROUTER_TRAINING)
    )


def layout(config: ModelConfig) -> Layout:
    return decoder.layout(config)
