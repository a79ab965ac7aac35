"""Learning-rate schedules: a multiplier in [0, 1] as a function of the step alone."""

from __future__ import annotations

import math

from grist_train.config import ScheduleConfig


def multiplier(step: int, steps: int, config: ScheduleConfig) -> float:
    """Factor for the update that takes the run from `step` to `step + 1` (`step` counts from 0).

    A linear warmup is followed by a cosine to `final_fraction` (Loshchilov & Hutter 2017, arXiv:1608.03983), by a straight
    line to it, by warmup-stable-decay (Hu et al. 2024, arXiv:2404.06395) whose tail is linear or 1 - sqrt(x) (Hägele et al.
    2024, arXiv:2405.18392), or by a constant.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return warmup * (config.final_fraction + (1.0 - config.final_fraction) * _decay(step, steps, config))


def _decay(step: int, steps: int, config: ScheduleConfig) -> float:
    """1 before the fall, 0 at the end of it."""
    if config.kind == "constant":
        return 1.0
    if config.kind == "wsd":
        decay_steps = config.decay_fraction * steps
        left = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
        return left if config.decay_shape == "linear" else 1.0 - math.sqrt(1.0 - left)
    progress = min(1.0, max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return 1.0 - progress if config.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
