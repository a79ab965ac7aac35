"""adapter_config.json: ranks and scales of PEFT's LoRA, read and written."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grist_model.hub import PREFIX as HUB
from grist_model.lora_layers import Pair

# Settings of PEFT's LoraConfig that change what an adapter computes, and that our pairs do not have -> the values that do not.
_WITHOUT: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
# Kinds of initial values for which PEFT changes the base model's weights as well.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError for an adapter that is not plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} has peft_type {config.get('peft_type')!r}, but only LORA is supported")
    for key, neutral in _WITHOUT.items():
        if config.get(key, neutral[0]) not in neutral:
            raise ValueError(f"{path} has {key} {config[key]!r}, but only {neutral[0]!r} is supported")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"{path} has init_lora_weights {start!r}, which changes the base model too: convert the adapter to plain LoRA "
            "with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), (int, float)):
        raise ValueError(
            f"{path} must have numbers r and lora_alpha, but has {config.get('r')}, {config.get('lora_alpha')}"
        )


def pair_of(config: Mapping[str, Any], module: str, rank: int, path: Path) -> Pair:
    """Scale of a module whose matrices have a rank. Raises ValueError where the file gives the module another rank."""
    stated = _matching(config.get("rank_pattern") or {}, module, config["r"])
    if stated != rank:
        raise ValueError(f"{path} gives {module} rank {stated}, but its matrices have rank {rank}")
    alpha = _matching(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return Pair(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """As PEFT's get_pattern_key: the first pattern that the end of the name fits."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def written(
    modules: Mapping[str, Pair], parameters: Mapping[str, Pair], base: str | None, conv1d: bool
) -> dict[str, Any]:
    """adapter_config.json: of modules, and parameters of experts, that have pairs, with what those are like in the file.

    Names that all layers share are given without the layer. conv1d: the modules keep their weights as (in, out), as GPT-2 does.
    """
    pairs = {**modules, **parameters}
    short = _shortened(pairs)
    (rank, scale), _ = Counter((pair.rank, pair.scale) for pair in pairs.values()).most_common(1)[0]
    alpha = _number(scale * rank)
    ranks = {short[name]: pair.rank for name, pair in pairs.items() if pair.rank != rank}
    alphas = {short[name]: _number(pair.scale * pair.rank) for name, pair in pairs.items()}
    name, revision = _base_model(base)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "init_lora_weights": True,
        "target_modules": sorted({short[name] for name in modules}),
        "target_parameters": sorted({short[name] for name in parameters}) or None,
        "rank_pattern": ranks,
        "alpha_pattern": {key: value for key, value in alphas.items() if value != alpha},
    }


def _shortened(pairs: Mapping[str, Pair]) -> dict[str, str]:
    """Full name -> what stands behind the number of the layer, where that means the same in every layer."""
    behind = {name: re.sub(r"^.*?\.\d+\.", "", name) for name in pairs}
    layers = len({name.removesuffix(behind[name]) for name in pairs})
    kinds: dict[str, set[Pair]] = {}
    for name, pair in pairs.items():
        kinds.setdefault(behind[name], set()).add(pair)
    counts = Counter(behind.values())
    alike = all(counts[key] == layers and len(kinds[key]) == 1 for key in counts)
    return behind if alike else {name: name for name in pairs}


def _number(value: float) -> int | float:
    rounded = round(value, 9)
    return int(rounded) if rounded == int(rounded) else rounded


def _base_model(base: str | None) -> tuple[str | None, str | None]:
    """Name and revision for the file: of a directory in the hub's cache those that it was downloaded as."""
    if base is None:
        return None, None
    cached = re.search(r"models--(.+?)--([^/]+)/snapshots/([^/]+)/?$", str(base).replace("\\", "/"))
    if cached:
        return f"{cached[1]}/{cached[2]}", cached[3]
    if base.startswith(HUB):
        name, _, revision = base.removeprefix(HUB).partition("@")
        return name, revision or None
    return base, None
