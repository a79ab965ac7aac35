"""Our own layout, for whatever no released family can express: every field of ModelConfig, our own tensor names.

Read by `grist_model.load` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING, Any

from grist_model.config import ModelConfig, RopeScaling, YarnConfig
from grist_model.families.layout import Layout, Piece, own_shapes

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = "gristmill"
REQUIRED = ()
_ADDED_ON_SAVING = {
    "model_type",
    "architectures",
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


def misfit(config: ModelConfig, state: Mapping[str, Tensor] | None = None) -> str | None:
    return None


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": MODEL_TYPE, "architectures": ["GristmillForCausalLM"], **asdict(config)}


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """Raises ValueError for a setting this version does not know: ignoring it would change the model silently."""
    settings = {key: value for key, value in config.items() if key not in _ADDED_ON_SAVING}
    unknown = sorted(settings.keys() - {field.name for field in fields(ModelConfig)})
    if unknown:
        raise ValueError(
            f"config.json has settings this version of gristmill does not know: {', '.join(unknown)} "
            "(written by a newer version?)"
        )
    for name, kind in (("yarn", YarnConfig), ("rope_scaling", RopeScaling)):
        if settings.get(name) is not None:
            settings[name] = _part(kind, settings[name], name)
    if isinstance(settings.get("window_layers"), list):
        settings["window_layers"] = tuple(settings["window_layers"])
    return ModelConfig(**settings)


def _part(kind: type, given: Any, name: str) -> Any:
    required = [field.name for field in fields(kind) if field.default is MISSING]
    allowed = [field.name for field in fields(kind)]
    if not isinstance(given, dict) or not set(required) <= given.keys() <= set(allowed):
        raise ValueError(
            f"config.json: {name} must hold {', '.join(required)}, and of {', '.join(allowed)}, but is {given!r}"
        )
    return kind(**given)


def layout(config: ModelConfig) -> Layout:
    shapes = own_shapes(config)
    return Layout(shapes, shapes, tuple(Piece(name, name) for name in shapes))
