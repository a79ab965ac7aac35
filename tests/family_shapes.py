"""A tiny model of every family, in every way that its config.json can be spelled, of sizes that every client accepts.

Width 256 with heads of 64: vLLM on a CPU wants heads of 32 or more, GGUF's block formats rows of 256, and OLMoE in llama.cpp
as many key/value heads as heads.
"""

from __future__ import annotations

import torch

import grist_model
from grist_model import ModelConfig, RopeScaling, Transformer, YarnConfig

_SIZES = {
    "vocab_size": 512,
    "context_length": 256,
    "layers": 4,
    "width": 256,
    "heads": 4,
    "kv_heads": 2,
    "expert_width": 256,
}
_PLAIN = {
    **_SIZES, "sinks": False, "attention_bias": False, "mlp_bias": False, "router_bias": False, "swiglu_alpha": None,
    "swiglu_limit": None, "window": None, "window_layers": "none", "rope_theta": 5e5,
}  # fmt: skip
_EXPERTS = {**_PLAIN, "experts": 4, "active_experts": 2}
_GPT_OSS = {**_SIZES, "experts": 4, "active_experts": 2, "window": 32}
_GPT2 = {
    **_PLAIN, "experts": 0, "kv_heads": 4, "positions": "learned", "norm": "layer", "activation": "gelu_tanh",
    "attention_bias": True, "mlp_bias": True, "tied_embeddings": True, "expert_width": 1024,
}  # fmt: skip
_LLAMA3 = RopeScaling("llama3", 8.0, original_context=64)

# family -> what of it -> settings of ModelConfig
SHAPES = {
    "gpt_oss": {
        "yarn": _GPT_OSS | {"yarn": YarnConfig(8.0, 32)},
        "yarn, truncated": _GPT_OSS | {"yarn": YarnConfig(8.0, 32, truncate=True), "tied_embeddings": True},
        "plain": _GPT_OSS | {"rope_theta": 10000.0, "window_layers": "all"},
        "linear": _GPT_OSS | {"rope_scaling": RopeScaling("linear", 4.0), "window_layers": "none", "attention_bias": False},
    },
    "llama": {
        "plain": _PLAIN | {"experts": 0},
        "llama 3": _PLAIN | {"experts": 0, "rope_scaling": _LLAMA3, "tied_embeddings": True},
        "linear, biases": _PLAIN | {
            "experts": 0, "rope_scaling": RopeScaling("linear", 4.0), "attention_bias": True, "mlp_bias": True},
        "dynamic": _PLAIN | {"experts": 0, "rope_scaling": RopeScaling("dynamic", 4.0, original_context=64)},
        "yarn": _PLAIN | {"experts": 0, "yarn": YarnConfig(8.0, 32)},
        "narrow heads": _PLAIN | {"experts": 0, "head_width": 32},
    },
    "qwen3": {
        "plain": _PLAIN | {"experts": 0, "qk_norm": "head"},
        "windows, yarn": _PLAIN | {
            "experts": 0, "qk_norm": "head", "window": 32, "window_layers": (2, 3), "yarn": YarnConfig(8.0, 32),
            "attention_bias": True},
        "alternating windows": _PLAIN | {
            "experts": 0, "qk_norm": "head", "window": 32, "window_layers": "alternate", "tied_embeddings": True},
    },
    "qwen3_moe": {
        "plain": _EXPERTS | {"qk_norm": "head"},
        "all weights, llama 3": _EXPERTS | {
            "qk_norm": "head", "router_weights": "all", "rope_scaling": _LLAMA3, "attention_bias": True},
        "windows": _EXPERTS | {"qk_norm": "head", "window": 32, "window_layers": "all", "tied_embeddings": True},
    },
    "mixtral": {
        "plain": _EXPERTS,
        "windows, linear": _EXPERTS | {
            "window": 32, "window_layers": "all", "rope_scaling": RopeScaling("linear", 4.0), "tied_embeddings": True},
    },
    "olmoe": {
        "plain": _EXPERTS | {"qk_norm": "width", "kv_heads": 4, "router_weights": "all"},
        "chosen weights, yarn": _EXPERTS | {
            "qk_norm": "width", "kv_heads": 4, "yarn": YarnConfig(8.0, 32), "attention_bias": True},
    },
    "gpt2": {
        "plain": _GPT2,
        "a head of its own, erf": _GPT2 | {"tied_embeddings": False, "activation": "gelu"},
    },
}  # fmt: skip


def model_of(family: str, name: str) -> Transformer:
    """With no parameter zero or one: none can be ignored, or left out of a file."""
    model = grist_model.build(ModelConfig(**SHAPES[family][name])).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model
