"""A family translates between a model of ours and the Hugging Face directory of other people's software.

A family is a module here with two names and four functions, and its line in FAMILIES, the first that can express a model
being the one it is saved as:

    MODEL_TYPE                                its name in config.json
    REQUIRED                                  keys of a config.json that decide shapes and have no sensible default
    config_from_hf(dict) -> ModelConfig       the settings of a config.json; ValueError for what it cannot express
    config_to_hf(ModelConfig) -> dict         the other way, without token ids and types of numbers
    misfit(ModelConfig, state) -> str | None  why a model cannot be written in this family; state None: its config alone
    layout(ModelConfig) -> Layout             every tensor, its names on both sides and the change of layout between them
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from grist_model.config import ModelConfig
from grist_model.families import gpt2, gpt_oss, gristmill, llama, mixtral, olmoe, qwen3, qwen3_moe
from grist_model.families.checks import check_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# model_type in config.json -> module; ours, which expresses everything, comes last.
_MODULES = (gpt_oss, llama, qwen3, qwen3_moe, mixtral, olmoe, gpt2, gristmill)
FAMILIES: dict[str, ModuleType] = {module.MODEL_TYPE: module for module in _MODULES}


def family_of_hf(config: dict[str, Any]) -> ModuleType:
    """The family that reads a config.json.

    Raises ValueError for a model_type that has none, and for keys that are missing or of another kind than they must be.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"config.json has model_type {name!r}, but only {', '.join(FAMILIES)} can be read")
    check_settings(config, FAMILIES[name].REQUIRED)
    return FAMILIES[name]


def family_for(config: ModelConfig, state: Mapping[str, Tensor] | None = None) -> ModuleType:
    """The first family that can express a model, given its config and, where that decides, its state dict."""
    for family in FAMILIES.values():
        if family.misfit(config, state) is None:
            return family
    raise AssertionError("gristmill expresses every config")
