"""Settings of what a run reports and of its profile. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LoggingConfig:
    """Where the figures of a run go besides `metrics.jsonl`, and how detailed they are.

    Attributes:
        tensorboard: Write `RUN/tensorboard`.
        wandb: Project of Weights & Biases; None leaves it alone. Needs `pip install wandb`.
        wandb_mode: `offline` writes to `RUN/wandb` only; `wandb sync` uploads it later.
        grad_norm_by_layer: The gradient norm of every block, beside those of embedding, attention, experts and so on.
    """

    tensorboard: bool = True
    wandb: str | None = None
    wandb_mode: Literal["online", "offline"] = "online"
    grad_norm_by_layer: bool = False


@dataclass(frozen=True)
class ProfileConfig:
    """Record some steps of a run, every operation with its time, in `RUN/profile`.

    Attributes:
        steps: First and last step to record, counted from 1 as in `metrics.jsonl`. The first steps of a process compile and
            allocate: leave out two or three.
        memory: Record allocations too: in the trace, and on CUDA as a snapshot for https://docs.pytorch.org/memory_viz.
    """

    steps: tuple[int, int] = (4, 6)
    memory: bool = False


def check_logging(logging: LoggingConfig, profile: ProfileConfig | None, steps: int) -> None:
    """steps: of the run. Raises ValueError for what cannot be meant."""
    if logging.wandb == "":
        raise ValueError("logging.wandb is the name of a project, but is empty: give one, or null for none")
    if profile is not None and not 1 <= profile.steps[0] <= profile.steps[1] <= steps:
        raise ValueError(
            f"profile.steps must be [first, last] with 1 <= first <= last <= steps, {steps}, but is {list(profile.steps)}"
        )
