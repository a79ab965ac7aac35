"""Settings of resumable checkpoints. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckpointConfig:
    """Resumable checkpoints, `RUN/checkpoints/step-N`.

    Attributes:
        every: Steps between checkpoints; 0 saves only at the end and when stopped.
        keep_last: How many of the newest to keep; the one with the best validation loss is kept besides.
        keep_every: Keep for good those whose step is a multiple of this; null keeps none beside the newest and the best.
        asynchronous: Write in a background thread while training goes on, from one copy in host memory.
        pinned: Make that copy in page-locked memory and keep it: faster on CUDA, but the memory is taken for the whole run.
        portable: Weights of the portable model at the end: the last ones, or those of the best validation loss.
        verify: What is compared with a checkpoint's manifest before it is loaded: size and hash of every file, sizes alone,
            or nothing. Ranks share the reading.
        max_failures: Checkpoints in a row that may fail to be written before the run ends; until then training goes on.
        deadline_seconds: Time from a signal to the end of the process: what takes longer (the step, the checkpoint) is given
            up, and the checkpoint before it stays the last. null waits.
    """

    every: int = 200
    keep_last: int = 2
    keep_every: int | None = None
    asynchronous: bool = True
    pinned: bool = False
    portable: Literal["last", "best"] = "last"
    verify: Literal["full", "size", "none"] = "full"
    max_failures: int = 3
    deadline_seconds: float | None = None


def check_checkpoint(config: CheckpointConfig) -> None:
    """Raises ValueError for what cannot be meant."""
    if config.keep_last < 1:
        raise ValueError(
            f"checkpoint.keep_last must be at least 1, but is {config.keep_last}: a resumable run needs one"
        )
    if config.keep_every is not None:
        if config.keep_every < 1:
            raise ValueError(f"checkpoint.keep_every must be at least 1, or null for none, but is {config.keep_every}")
        if config.every < 1 or config.keep_every % config.every:
            raise ValueError(
                f"checkpoint.keep_every {config.keep_every} must be a multiple of checkpoint.every {config.every}: only what "
                "is saved can be kept"
            )
    if config.pinned and not config.asynchronous:
        raise ValueError(
            "checkpoint.pinned is about the copy that checkpoint.asynchronous makes, which is false: set one of them"
        )
    if config.max_failures < 1:
        raise ValueError(
            f"checkpoint.max_failures must be at least 1, but is {config.max_failures}: 1 ends the run at the first failure"
        )
    if config.deadline_seconds is not None and config.deadline_seconds <= 0:
        raise ValueError(
            f"checkpoint.deadline_seconds must be above 0, or null to wait, but is {config.deadline_seconds}"
        )
