"""A small model of every family, with adapters whose pairs are nowhere zero."""

from __future__ import annotations

from typing import Any

import torch
from tiny_house import model

from grist_model import Transformer, lora
from grist_model.lora_config import LoraConfig

_PLAIN: dict[str, Any] = {
    "sinks": False, "mlp_bias": False, "router_bias": False, "attention_bias": False, "swiglu_alpha": None,
    "swiglu_limit": None, "window": None, "window_layers": "none",
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": {},
    "llama": {**_PLAIN, "experts": 0},
    "qwen3": {**_PLAIN, "experts": 0, "qk_norm": "head"},
    "qwen3_moe": {**_PLAIN, "qk_norm": "head"},
    "mixtral": _PLAIN,
    "olmoe": {**_PLAIN, "qk_norm": "width"},
    "gpt2": {
        **_PLAIN, "experts": 0, "activation": "gelu_tanh", "norm": "layer", "positions": "learned", "mlp_bias": True,
        "attention_bias": True, "kv_heads": 4,
    },
    "gristmill": {"shared_expert_width": 24},
}  # fmt: skip


def adapted(family: str, **settings: Any) -> Transformer:
    """A model of a family with adapters that change what it computes."""
    made = model(**FAMILIES[family])
    lora.attach(made, lora.adapter_shape(made.config, LoraConfig(**{"rank": 3, "alpha": 5.0, **settings})))
    randomize(made)
    return made


def randomize(made: Transformer) -> None:
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3)
