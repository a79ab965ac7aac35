"""The angles of rotary position embedding, plain and scaled for longer contexts. B batch, T time, H head width."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from grist_model.config import ModelConfig, RopeScaling, YarnConfig


def frequencies(
    width: int, theta: float, scaling: YarnConfig | RopeScaling | None, device: torch.device | None = None
) -> Tensor:
    """(H/2,) float32: how far each pair of a head of `width` H turns per token, in radians.

    Plain RoPE (Su et al., 2021): theta^(-2i/H). YaRN (Peng et al., 2023, section 3.2) divides the slow ones by its
    factor; RopeScaling says what the others do ("dynamic": here as within its original context).
    """
    index = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    kept = 1.0 / (theta ** (index / width))
    if scaling is None or (isinstance(scaling, RopeScaling) and scaling.kind == "dynamic"):
        return kept
    if isinstance(scaling, YarnConfig):
        low, high = _ramp_bounds(width, theta, scaling)
        pair = torch.arange(width // 2, dtype=torch.float32, device=device)
        stretched_share = ((pair - low) / (high - low)).clamp(0, 1)
    elif scaling.kind == "linear":
        return kept / scaling.factor
    else:
        turns = scaling.original_context * kept / (2 * math.pi)  # within the original context
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        stretched_share = ((high - turns) / (high - low)).clamp(0, 1)
    return kept / scaling.factor * stretched_share + kept * (1 - stretched_share)


def _ramp_bounds(width: int, theta: float, yarn: YarnConfig) -> tuple[float, float]:
    """The pairs between which YaRN's ramp runs: those turning beta_fast and beta_slow times in the original context."""

    def pair_that_turns(times: float) -> float:
        return width * math.log(yarn.original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = (
        max(low, 0),
        min(high, width - 1),
    )  # width - 1, not width / 2 - 1, as every released implementation has it
    return low, high if high != low else high + 0.001


def magnitude(yarn: YarnConfig | None) -> float:
    """What cos and sin are multiplied by: YaRN's attention temperature 0.1 ln(factor) + 1, applied to q and k alike."""
    return 1.0 if yarn is None else 0.1 * math.log(yarn.factor) + 1.0


class RotaryAngles(nn.Module):
    """Positions -> (cos, sin), float32 whatever the type of the model.

    A bfloat16 table turns distant tokens by wrong angles, and `model.to(torch.bfloat16)` casts every buffer, so the
    buffer is made anew after each conversion. For the same reason it survives `meta` -> `to_empty`.
    """

    frequency_P: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.width, self.theta = config.attention_head_width, config.rope_theta
        self.scaling = config.yarn or config.rope_scaling
        self.magnitude = magnitude(config.yarn)
        self.register_buffer("frequency_P", torch.empty(self.width // 2), persistent=False)
        self.reset()

    def reset(self, device: torch.device | str | None = None) -> None:
        """Compute the buffer again, on a device (None: where it is)."""
        target = torch.device(device) if device is not None else self.frequency_P.device
        if target.type == "meta":  # the first torch.arange on meta takes a second of imports
            self.frequency_P = torch.empty(self.width // 2, device=target)
        else:
            self.frequency_P = frequencies(self.width, self.theta, self.scaling, target)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryAngles:
        super()._apply(fn, recurse)
        self.reset()
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (T,) or (B, T), integers -> cos and sin, each (T, H/2) or (B, T, H/2) float32."""
        angle = positions.unsqueeze(-1) * self._frequency(positions)
        if self.magnitude == 1.0:
            return angle.cos(), angle.sin()
        return angle.cos() * self.magnitude, angle.sin() * self.magnitude

    def _frequency(self, positions: Tensor) -> Tensor:
        """Those of the buffer, or with "dynamic" scaling those of a call whose last token stands at the highest position. That
        makes the host wait for the device."""
        scaling = self.scaling
        if not isinstance(scaling, RopeScaling) or scaling.kind != "dynamic" or positions.numel() == 0:
            return self.frequency_P
        stretch = scaling.factor * (int(positions.max()) + 1) / scaling.original_context - (scaling.factor - 1)
        if stretch <= 1:
            return self.frequency_P
        theta = self.theta * stretch ** (self.width / (self.width - 2))
        return frequencies(self.width, theta, None, self.frequency_P.device)
