"""Rotary settings of a config.json, in both spellings.

Version 5 of transformers writes rope_parameters; version 4 reads rope_theta and rope_scaling, and without them turns positions
silently at another rate.
"""

from __future__ import annotations

import math
from typing import Any

from grist_model.config import ModelConfig, RopeScaling, YarnConfig
from grist_model.families.checks import check_settings

# rope_type -> what it cannot do without.
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


def rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """rope_theta, rope_scaling, rope_parameters and max_position_embeddings."""
    rope = _scaling_to_hf(config)
    dynamic = config.rope_scaling if rope["rope_type"] == "dynamic" else None
    return {
        "max_position_embeddings": dynamic.original_context if dynamic else config.context_length,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
    }


def rope_misfit(config: ModelConfig) -> str | None:
    """What a dynamic scaling needs: its file names the original context only."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "dynamic" or config.context_length == _dynamic_context(scaling):
        return None
    return f"dynamic scaling has a context_length of factor * original_context, {_dynamic_context(scaling)}"


def rope_from_hf(config: dict[str, Any], default_theta: float, default_context: int) -> dict[str, Any]:
    """rope_theta, yarn, rope_scaling and context_length of a ModelConfig.

    Raises ValueError for a kind of scaling, or a setting of YaRN, that our model does not have.
    """
    where = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(where) or {}
    context = int(config.get("max_position_embeddings", default_context))
    theta = float(rope.get("rope_theta", config.get("rope_theta", default_theta)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    found: dict[str, Any] = {"rope_theta": theta, "context_length": context}
    if float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("config.json turns only a part of each head (partial_rotary_factor), which is not supported")
    if kind == "default":
        return found
    if kind not in _REQUIRED:
        known = ", ".join(["default", *_REQUIRED])
        raise ValueError(f"config.json has rope_type {kind!r}, but only {known} are supported")
    check_settings(rope, _REQUIRED[kind], f"config.json, {where}")
    if kind == "yarn":
        return found | {"yarn": _yarn_from_hf(rope, context)}
    factor = float(rope["factor"])
    if kind == "linear":
        return found | {"rope_scaling": RopeScaling("linear", factor)}
    if kind == "dynamic":
        scaling = RopeScaling("dynamic", factor, int(rope.get("original_max_position_embeddings") or context))
        return found | {"rope_scaling": scaling, "context_length": _dynamic_context(scaling)}
    original = int(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    return found | {"rope_scaling": RopeScaling("llama3", factor, original, low, high)}


def _dynamic_context(scaling: RopeScaling) -> int:
    return round(scaling.factor * scaling.original_context)


def _scaling_to_hf(config: ModelConfig) -> dict[str, Any]:
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
    if scaling.kind in ("linear", "dynamic"):
        return {"rope_type": scaling.kind, "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def _yarn_from_hf(rope: dict[str, Any], context: int) -> YarnConfig:
    yarn = YarnConfig(
        factor=float(rope["factor"]),
        original_context=int(rope.get("original_max_position_embeddings") or context),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=bool(rope.get("truncate", True)),
    )
    given, ours = rope.get("attention_factor"), 0.1 * math.log(yarn.factor) + 1.0
    if given is not None and not math.isclose(given, ours, rel_tol=1e-6):
        raise ValueError(f"config.json has attention_factor {given}, but only YaRN's own {ours} is supported")
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise ValueError("config.json has YaRN's mscale settings, which are not supported")
    return yarn
