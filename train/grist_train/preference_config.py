"""Settings of a run on preferences: pairs of answers, of which one is better. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from grist_data.prepare import PrepareConfig


@dataclass(frozen=True)
class PreferenceConfig:
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290), of a model that answers already.

    With r = log p(answer) - log p_reference(answer), summed over the tokens of the answer, and m = r(chosen) - r(rejected), a
    pair's loss is -(1 - label_smoothing) * log sigmoid(beta * m) - label_smoothing * log sigmoid(-beta * m). The reference is
    the model that the run begins with.

    Attributes:
        paths: JSON-lines files or globs of pairs: `prompt`, `chosen` and `rejected`, each a text or a list of messages.
        contrast: Instead of files, a source of conversations: the last answer of each is chosen, another one's rejected. Of the
            settings only those of the source count.
        raw_text: Take texts as they are instead of as turns of the tokenizer's chat template.
        beta: How dear it is to leave the reference: small values let the model go far.
        label_smoothing: Share of the pairs that are taken to be the wrong way round (cDPO, Mitchell 2023).
        sft_weight: Adds so much of the chosen answer's mean loss per token, which keeps it likely (Pang et al. 2024,
            arXiv:2404.19733, equation 1).
        max_tokens: Pairs with a longer sequence are left out, and counted aloud; None is the model's context.
        max_pairs: Take so many pairs, drawn by seed and content; None takes all. All that are taken are measured before the
            first step.
        val_fraction: Share of the pairs that is held out.
    """

    paths: tuple[str, ...] = ()
    contrast: PrepareConfig | None = None
    raw_text: bool = False
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    max_tokens: int | None = None
    max_pairs: int | None = None
    val_fraction: float = 0.05


def check_preferences(config: PreferenceConfig) -> None:
    """Raises ValueError for what cannot be meant."""
    if bool(config.paths) == (config.contrast is not None):
        raise ValueError(
            "preferences need either paths, JSON lines of prompt, chosen and rejected, or contrast, a source of conversations"
        )
    if not 0 < config.beta < float("inf"):
        raise ValueError(f"preferences.beta must be above 0, but is {config.beta}")
    if not 0 <= config.label_smoothing < 0.5:
        raise ValueError(
            f"preferences.label_smoothing must be at least 0 and below 0.5, but is {config.label_smoothing}"
        )
    if not 0 <= config.sft_weight < float("inf"):
        raise ValueError(f"preferences.sft_weight must be at least 0, but is {config.sft_weight}")
    if config.max_tokens is not None and config.max_tokens < 2:
        raise ValueError(f"preferences.max_tokens must be at least 2, but is {config.max_tokens}")
    if config.max_pairs is not None and config.max_pairs < 1:
        raise ValueError(f"preferences.max_pairs must be at least 1, but is {config.max_pairs}")
    if not 0 <= config.val_fraction < 1:
        raise ValueError(f"preferences.val_fraction must be at least 0 and below 1, but is {config.val_fraction}")
