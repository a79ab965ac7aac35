"""GPT-OSS (OpenAI, 2025), as transformers reads and writes it in bfloat16 or float32: GptOssForCausalLM.

D model width, E experts, F expert width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from grist_model.config import ModelConfig, RopeScaling, YarnConfig
from grist_model.families.layout import TensorMap, own_shapes

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = "gpt_oss"
ALPHA = 1.702  # fixed in transformers before version 5, so the only one written
_SLIDING, _FULL = "sliding_attention", "full_attention"
# What config.json of this family has no key for; kept in a section of our own that other software passes over.
_OWN_FIELDS = ("balance", "router_z_loss_weight", "bias_update_rate")


def misfit(config: ModelConfig, state: Mapping[str, Tensor] | None = None) -> str | None:
    """Why GPT-OSS cannot express this model, or None. A selection bias fits only while it is all zeros."""
    needs = {
        "experts > 0": config.experts > 0,
        "attention sinks": config.sinks,
        "biases in experts (mlp_bias)": config.mlp_bias,
        "a router bias": config.router_bias,
        "no shared expert": not config.shared_expert_width,
        f"swiglu_alpha {ALPHA}": config.swiglu_alpha == ALPHA,
        "a swiglu_limit": config.swiglu_limit is not None,
    }
    if config.experts and config.balance == "bias":
        zero = state is not None and not any(
            bool(tensor.any()) for name, tensor in state.items() if name.endswith("router.selection_bias")
        )
        needs["no selection bias in use"] = zero
    missing = [need for need, met in needs.items() if not met]
    return f"GPT-OSS has {', '.join(missing)}" if missing else None


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Both spellings of every setting that transformers 4 and 5 spell differently.

    Version 5 reads rope_parameters; 4.57 reads rope_theta and rope_scaling, and without them turns positions silently
    at another rate. Published files have experts_per_token beside num_experts_per_tok.
    """
    windows = [config.layer_window(layer) for layer in range(config.layers)]
    rope = _rope_to_hf(config)
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["GptOssForCausalLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "initial_context_length": rope.get("original_max_position_embeddings", config.context_length),
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.attention_head_width,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        # transformers insists on a number, also where no layer slides.
        "sliding_window": config.window or config.context_length,
        "layer_types": [_FULL if window is None else _SLIDING for window in windows],
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.active_experts,
        "experts_per_token": config.active_experts,
        "intermediate_size": config.expert_width,
        "hidden_act": "silu",
        "swiglu_alpha": config.swiglu_alpha,
        "swiglu_limit": config.swiglu_limit,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.initializer_range,
        "output_router_logits": False,
        "router_aux_loss_coef": config.aux_loss_weight,
        "use_cache": True,
        "gristmill": {name: getattr(config, name) for name in _OWN_FIELDS},
    }


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    if config.yarn is not None:
        return {
            "rope_type": "yarn",
            "factor": config.yarn.factor,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            "truncate": config.yarn.truncate,
            "original_max_position_embeddings": config.yarn.original_context,
        }
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default"}
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """Read either spelling; a key left out has the default of transformers' GptOssConfig.

    Raises ValueError for settings that our model does not have, and for quantized weights.
    """
    _refuse_unsupported(config)
    layers = config.get("num_hidden_layers", 36)
    window_layers = _window_layers(config, layers)
    theta, scaling = _rope_from_hf(config)
    width, heads = config.get("hidden_size", 2880), config.get("num_attention_heads", 64)
    head_width = config.get("head_dim", 64)
    own = config.get("gristmill") or {}
    return ModelConfig(
        vocab_size=config.get("vocab_size", 201088),
        context_length=config.get("max_position_embeddings", 131072),
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=config.get("num_key_value_heads", 8),
        head_width=None if head_width * heads == width else head_width,
        attention_bias=config.get("attention_bias", True),
        sinks=True,
        window=None if window_layers == "none" else config.get("sliding_window", 128),
        window_layers=window_layers,
        experts=config.get("num_local_experts", 128),
        active_experts=config.get("num_experts_per_tok", config.get("experts_per_token", 4)),
        expert_width=config.get("intermediate_size", 2880),
        swiglu_alpha=config.get("swiglu_alpha", ALPHA),
        swiglu_limit=config.get("swiglu_limit", 7.0),
        rope_theta=theta,
        yarn=scaling if isinstance(scaling, YarnConfig) else None,
        rope_scaling=scaling if isinstance(scaling, RopeScaling) else None,
        norm_eps=config.get("rms_norm_eps", 1e-5),
        tied_embeddings=config.get("tie_word_embeddings", False),
        initializer_range=config.get("initializer_range", 0.02),
        aux_loss_weight=config.get("router_aux_loss_coef", 0.001),
        **{name: own[name] for name in _OWN_FIELDS if name in own},
    )


def tensors(config: ModelConfig) -> list[TensorMap]:
    maps = [_tensor_map(name, shape) for name, shape in own_shapes(config).items()]
    if config.tied_embeddings:  # some writers repeat the embedding as the head
        maps = [replace(m, also_named=("lm_head.weight",)) if m.name == "embedding.weight" else m for m in maps]
    return maps


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


def _tensor_map(name: str, shape: tuple[int, ...]) -> TensorMap:
    if name.endswith("router.selection_bias"):
        return TensorMap(name, shape, None)
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    prefix, rest = (f"model.layers.{block[1]}.", block[2]) if block else ("", name)
    if rest in _WHOLE_NAMES:
        hf_name = prefix + _WHOLE_NAMES[rest]
    else:
        module, _, leaf = rest.rpartition(".")
        hf_name = f"{prefix}{_NAMES[module]}.{leaf}"
    if rest.endswith(("w_gate_up", "b_gate_up")):
        return TensorMap(name, shape, hf_name, to_hf=_interleave, from_hf=_halves)
    return TensorMap(name, shape, hf_name)


def _interleave(x: Tensor) -> Tensor:
    """[gate | up] halves of the last axis -> gate in the even columns, up in the odd."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _halves(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _refuse_unsupported(config: dict[str, Any]) -> None:
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise ValueError(f"these weights are quantized with {method}: dequantize them to bfloat16 first")
    for key, expected in (("hidden_act", "silu"), ("attention_dropout", 0.0)):
        if config.get(key, expected) != expected:
            raise ValueError(f"config.json has {key} {config[key]!r}, but only {expected!r} is supported")


def _window_layers(config: dict[str, Any], layers: int) -> Literal["alternate", "all", "none"]:
    alternate = [_FULL if layer % 2 else _SLIDING for layer in range(layers)]
    kinds = config.get("layer_types") or alternate
    if kinds == alternate:
        return "alternate"
    if kinds == [_SLIDING] * layers:
        return "all"
    if kinds == [_FULL] * layers:
        return "none"
    raise ValueError(
        f"layer_types must alternate from {_SLIDING}, or be the same in all {layers} layers, but are {kinds}"
    )


def _rope_from_hf(config: dict[str, Any]) -> tuple[float, YarnConfig | RopeScaling | None]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 150000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not rope and "rope_theta" not in config:
        rope, kind = {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}, "yarn"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        original = int(rope["original_max_position_embeddings"])
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return theta, RopeScaling("llama3", float(rope["factor"]), original, low, high)
    if kind != "yarn":
        raise ValueError(f"config.json has rope_type {kind!r}, but only default, linear, llama3 and yarn are supported")
    yarn = YarnConfig(
        factor=float(rope["factor"]),
        original_context=int(rope["original_max_position_embeddings"]),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=bool(rope.get("truncate", True)),
    )
    given, ours = rope.get("attention_factor"), 0.1 * math.log(yarn.factor) + 1.0
    if given is not None and not math.isclose(given, ours, rel_tol=1e-6):
        raise ValueError(f"config.json has attention_factor {given}, but only YaRN's own {ours} is supported")
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise ValueError("config.json has YaRN's mscale settings, which are not supported")
    return theta, yarn
