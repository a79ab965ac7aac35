"""A decoder in the style of GPT-OSS: shapes, forward pass, initial weights, generation and the Hugging Face directory.

`import grist_model` loads no torch; the names below that need it load it when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grist_model import accounting
from grist_model.batching import generate_many
from grist_model.config import ModelConfig, RopeScaling, YarnConfig

# Imported eagerly: a submodule of the same name would otherwise take the function's place in this namespace.
from grist_model.generate import generate, stream

if TYPE_CHECKING:
    from grist_model.adapters import load_adapter, save_adapter
    from grist_model.checkpoint import config_of, load, load_into, save
    from grist_model.initialization import initialize
    from grist_model.lora import merge
    from grist_model.moe import RouterStats
    from grist_model.transformer import Transformer, build

_LAZY = {
    "RouterStats": "grist_model.moe",
    "Transformer": "grist_model.transformer",
    "build": "grist_model.transformer",
    "initialize": "grist_model.initialization",
    "config_of": "grist_model.checkpoint",
    "load": "grist_model.checkpoint",
    "load_adapter": "grist_model.adapters",
    "load_into": "grist_model.checkpoint",
    "merge": "grist_model.lora",
    "save": "grist_model.checkpoint",
    "save_adapter": "grist_model.adapters",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


__all__ = [
    "ModelConfig",
    "RopeScaling",
    "RouterStats",
    "Transformer",
    "YarnConfig",
    "accounting",
    "build",
    "config_of",
    "generate",
    "generate_many",
    "initialize",
    "load",
    "load_adapter",
    "load_into",
    "merge",
    "save",
    "save_adapter",
    "stream",
]
