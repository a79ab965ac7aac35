"""GPT-OSS (OpenAI, 2025), as transformers reads and writes it in bfloat16 or float32: GptOssForCausalLM.

D model width, E experts, F expert width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from grist_model.config import ModelConfig
from grist_model.families.decoder import (
    ROUTER_TRAINING,
    SIZES,
    common_to_hf,
    from_own_section,
    own_section,
    refuse_unsupported,
    selection_bias_used,
    unmet,
)
from grist_model.families.layout import Layout, Piece, own_shapes
from grist_model.families.rope_settings import rope_from_hf, rope_misfit

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = "gpt_oss"
REQUIRED = (*SIZES, "num_local_experts")
ALPHA = 1.702  # fixed in transformers before version 5, so the only one written
_SLIDING, _FULL = "sliding_attention", "full_attention"


def misfit(config: ModelConfig, state: Mapping[str, Tensor] | None = None) -> str | None:
    """Why GPT-OSS cannot express this model, or None. A selection bias fits only while it is all zeros."""
    needs = {
        "experts > 0": config.experts > 0,
        "no qk_norm": config.qk_norm == "none",
        "rotary positions": config.positions == "rotary",
        "RMSNorm": config.norm == "rms",
        "no logit_softcap": config.logit_softcap is None,
        "router_weights chosen": config.router_weights == "chosen",
        rope_misfit(config) or "": rope_misfit(config) is None,
        "no selection bias in use": not selection_bias_used(config, state),
        "attention sinks": config.sinks,
        "biases in experts (mlp_bias)": config.mlp_bias,
        "a router bias": config.router_bias,
        "no shared expert": not config.shared_expert_width,
        f"swiglu_alpha {ALPHA}": config.swiglu_alpha == ALPHA,
        "a swiglu_limit": config.swiglu_limit is not None,
    }
    return unmet("GPT-OSS", needs)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Both spellings of every setting that transformers 4 and 5 spell differently.

    Version 5 reads rope_parameters; 4.57 reads rope_theta and rope_scaling, and without them turns positions silently
    at another rate. Published files have experts_per_token beside num_experts_per_tok.
    """
    windows = [config.layer_window(layer) for layer in range(config.layers)]
    common = common_to_hf(config, MODEL_TYPE, "GptOssForCausalLM")
    own = {
        "initial_context_length": (common["rope_scaling"] or {}).get(
            "original_max_position_embeddings", config.context_length
        ),
        # transformers insists on a number, also where no layer slides.
        "sliding_window": config.window or config.context_length,
        "layer_types": [_FULL if window is None else _SLIDING for window in windows],
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.active_experts,
        "experts_per_token": config.active_experts,
        "intermediate_size": config.expert_width,
        "swiglu_alpha": config.swiglu_alpha,
        "swiglu_limit": config.swiglu_limit,
        "output_router_logits": False,
        "router_aux_loss_coef": config.aux_loss_weight,
    }
    return common | own | own_section(config, *ROUTER_TRAINING)


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """Read either spelling; a key left out, but for the sizes in REQUIRED, has the default of transformers' GptOssConfig.

    Raises ValueError for settings that our model does not have, and for weights quantized in a way that is not read.
    """
    refuse_unsupported(config, hidden_act="silu", attention_dropout=0.0)
    layers = config["num_hidden_layers"]
    window_layers = _window_layers(config, layers)
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not rope and "rope_theta" not in config:  # the default of transformers' GptOssConfig
        yarn = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
        config = {**config, "rope_parameters": yarn}
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_width = config.get("head_dim", 64)
    return ModelConfig(
        vocab_size=config["vocab_size"],
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=config.get("num_key_value_heads", 8),
        head_width=None if head_width * heads == width else head_width,
        attention_bias=config.get("attention_bias", True),
        sinks=True,
        window=None if window_layers == "none" else config.get("sliding_window", 128),
        window_layers=window_layers,
        experts=config["num_local_experts"],
        active_experts=config.get("num_experts_per_tok", config.get("experts_per_token", 4)),
        expert_width=config["intermediate_size"],
        swiglu_alpha=config.get("swiglu_alpha", ALPHA),
        swiglu_limit=config.get("swiglu_limit", 7.0),
        norm_eps=config.get("rms_norm_eps", 1e-5),
        tied_embeddings=config.get("tie_word_embeddings", False),
        initializer_range=config.get("initializer_range", 0.02),
        aux_loss_weight=config.get("router_aux_loss_coef", 0.001),
        **rope_from_hf(config, 150000.0, 131072),
        **from_own_section(config, *ROUTER_TRAINING),
    )


def layout(config: ModelConfig) -> Layout:
    shapes = own_shapes(config)
    zeros = tuple(name for name in shapes if name.endswith("router.selection_bias"))
    pieces = tuple(_piece(name) for name in shapes if name not in zeros)
    copies = {"model.embed_tokens.weight": ("lm_head.weight",)} if config.tied_embeddings else {}
    return Layout(shapes, {piece.hf_name: shapes[piece.name] for piece in pieces}, pieces, zeros, copies)


_NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp.router": "mlp.router",
}
_WHOLE_NAMES = {
    "attention.sinks": "self_attn.sinks",
    "mlp.experts.w_gate_up": "mlp.experts.gate_up_proj",
    "mlp.experts.b_gate_up": "mlp.experts.gate_up_proj_bias",
    "mlp.experts.w_down": "mlp.experts.down_proj",
    "mlp.experts.b_down": "mlp.experts.down_proj_bias",
}


def _piece(name: str) -> Piece:
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    prefix, rest = (f"model.layers.{block[1]}.", block[2]) if block else ("", name)
    if rest in _WHOLE_NAMES:
        hf_name = prefix + _WHOLE_NAMES[rest]
    else:
        module, _, leaf = rest.rpartition(".")
        hf_name = f"{prefix}{_NAMES[module]}.{leaf}"
    if rest.endswith(("w_gate_up", "b_gate_up")):
        return Piece(name, hf_name, to_hf=_interleave, from_hf=_halves, by_rows=True)
    return Piece(name, hf_name)


def _interleave(x: Tensor) -> Tensor:
    """[gate | up] halves of the last axis -> gate in the even columns, up in the odd."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _halves(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _window_layers(config: dict[str, Any], layers: int) -> Literal["alternate", "all", "none"] | tuple[int, ...]:
    alternate = [_FULL if layer % 2 else _SLIDING for layer in range(layers)]
    kinds = config.get("layer_types") or alternate
    if kinds == alternate:
        return "alternate"
    if kinds == [_SLIDING] * layers:
        return "all"
    if kinds == [_FULL] * layers:
        return "none"
    if len(kinds) != layers or set(kinds) - {_SLIDING, _FULL}:
        raise ValueError(f"layer_types must give {_SLIDING} or {_FULL} for each of {layers} layers, but are {kinds}")
    return tuple(layer for layer, kind in enumerate(kinds) if kind == _SLIDING)
