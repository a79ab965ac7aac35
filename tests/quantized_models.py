"""Small models of families that are quantized, with the tokenizer of tiny_house, and their exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_house import portable

import grist_model

_PLAIN: dict[str, Any] = {
    "sinks": False, "attention_bias": False, "mlp_bias": False, "router_bias": False, "swiglu_alpha": None,
    "swiglu_limit": None, "window": None, "window_layers": "none", "width": 64, "heads": 2, "expert_width": 96,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"expert_width": 64},
    "llama": _PLAIN | {"experts": 0},
    "qwen3": _PLAIN | {"experts": 0, "qk_norm": "head", "tied_embeddings": True, "attention_bias": True},
    "qwen3_moe": _PLAIN | {"qk_norm": "head"},
    "mixtral": _PLAIN,
    "olmoe": _PLAIN | {"qk_norm": "width", "kv_heads": 2, "router_weights": "all"},
    "gpt2": _PLAIN
    | {"experts": 0, "kv_heads": 2, "positions": "learned", "norm": "layer", "activation": "gelu_tanh", "mlp_bias": True,
       "attention_bias": True, "tied_embeddings": True},
    "gristmill": {"balance": "bias", "qk_norm": "head"},
}  # fmt: skip


def directory_of(family: str, directory: Path, **changes: Any) -> Path:
    """A portable directory, float32, whose predictions are not all alike."""
    return portable(directory, **SHAPES[family] | changes)


def logits_of(directory: Path, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
    """(2, 24, V) on the same ids for every model."""
    model = grist_model.load(directory, dtype=dtype).eval()
    ids = torch.randint(model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids).float()
