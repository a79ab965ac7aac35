"""Settings of the guard. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GuardConfig:
    """What happens to a step that would harm the model.

    Attributes:
        spike_factor: Skip a step whose loss is so many standard deviations above the median of the last ones (both from
            medians, which a few wild values do not move); None accepts every finite loss.
        spike_window: How many accepted steps those are; nothing is a spike before half of them are there.
        patience: Steps in a row that may be skipped; one more ends the run, or rolls it back.
        rollback: Instead of ending there, go back to the last checkpoint and leave the skipped steps' samples out. Once for a
            checkpoint: the same steps failing again end the run.
    """

    spike_factor: float | None = None
    spike_window: int = 128
    patience: int = 3
    rollback: bool = False


def check_guard(config: GuardConfig) -> None:
    """Raises ValueError for what cannot be meant."""
    if config.spike_factor is not None and not 0 < config.spike_factor < float("inf"):
        raise ValueError(f"guard.spike_factor must be above 0, or null for none, but is {config.spike_factor}")
    if config.spike_window < 8:
        raise ValueError(f"guard.spike_window must be at least 8, but is {config.spike_window}")
    if config.patience < 0:
        raise ValueError(f"guard.patience must be at least 0, but is {config.patience}")
