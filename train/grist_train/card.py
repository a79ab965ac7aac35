"""What a run knows about its model, for the model card in its portable directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grist_data.manifest import read_manifest
from grist_model.hub import public_name
from grist_model.model_card import CardFacts
from grist_train.config import TrainConfig

# What a held-out evaluation measures; the rest of evaluation.json counts things.
_FIGURES = ("bits_per_byte", "loss", "perplexity", "preference_accuracy", "reward_margin")


def card_facts(config: TrainConfig, result: dict[str, Any] | None, tokens: int) -> CardFacts:
    """result: the held-out evaluation, None where nothing is held out. tokens: of the whole run."""
    optimizer = f"{config.optimizer.name}, {config.schedule.kind} schedule"
    training = {"steps": f"{config.steps:,}", "tokens": f"{tokens:,}", "optimizer": optimizer, "seed": config.seed}
    if config.preferences is not None:
        training["method"] = f"direct preference optimization, beta {config.preferences.beta}"
    if config.lora is not None:
        training["adapters"] = f"LoRA of rank {config.lora.rank} on {', '.join(config.lora.targets)}, folded in"
    return CardFacts(
        name=config.name,
        base_model=None if config.initial is None else public_name(config.initial),
        datasets=_datasets(config),
        metrics={name: result[name] for name in _FIGURES if result is not None and name in result},
        training=training,
    )


def _datasets(config: TrainConfig) -> tuple[str, ...]:
    """Names on the hub where they have one, else what the source is and the licence of its text."""
    if config.preferences is not None:
        contrast = config.preferences.contrast
        return tuple(config.preferences.paths) if contrast is None else (f"pairs made of {contrast.source}",)
    found = []
    for source in config.data.all_sources().values():
        manifest = read_manifest(Path(source.directory))
        facts = manifest.get("source") or {}
        name = (facts.get("options") or {}).get("name") or facts.get("name") or Path(source.directory).name
        licence = facts.get("licence")
        found.append(f"{name} ({licence})" if licence else name)
    return tuple(dict.fromkeys(found))
