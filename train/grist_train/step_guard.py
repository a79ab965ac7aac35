"""Which steps may change the model: decided on the device, so that nothing waits for the answer.

A step whose loss or gradient norm is not finite, or whose loss stands far above the last ones, is computed and counted but not
applied: weights and the optimizer's averages stay as they are. What was skipped is read later, with the other figures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grist_train.guard_config import GuardConfig

_SIGMA = 1.4826  # the median absolute deviation of a normal distribution, times this, is its standard deviation


class StepGuard:
    """Judges steps one after another. The last accepted losses stay on the device; no value that was skipped is among them."""

    def __init__(self, config: GuardConfig, device: torch.device | str, state: dict[str, Any] | None = None) -> None:
        """state: state.json of a run that goes on, which holds `state_dict`."""
        self._factor = config.spike_factor
        accepted = [] if state is None else state.get("accepted_losses", [])[-config.spike_window :]
        self._losses_W = torch.full((config.spike_window,), float("nan"))
        self._losses_W[: len(accepted)] = torch.tensor(accepted)
        self._losses_W = self._losses_W.to(device)
        self._n = torch.tensor(len(accepted), device=device)

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Both 0-dimensional, over all ranks -> bool on the device: whether to skip the step. Every rank gets the same answer
        from the same figures."""
        loss = loss.detach().float()
        skip = ~(loss.isfinite() & grad_norm.detach().isfinite())
        window = len(self._losses_W)
        if self._factor is not None:
            median = self._losses_W.nanmedian()
            sigma = _SIGMA * (self._losses_W - median).abs().nanmedian()
            # Equal losses have no deviation: what float32 cannot tell apart is no spike.
            limit = median + self._factor * sigma.clamp(min=torch.finfo(torch.float32).eps * 8 * median.abs())
            skip = skip | ((self._n >= window // 2) & (loss > limit))
        here = torch.arange(window, device=loss.device) == self._n % window
        self._losses_W = torch.where(here & ~skip, loss, self._losses_W)
        self._n += ~skip
        return skip

    def state_dict(self) -> dict[str, Any]:
        """The accepted losses, oldest first; waits for the device."""
        losses, n = self._losses_W.tolist(), int(self._n)
        at = n % len(losses)
        return {"accepted_losses": losses[at:] + losses[:at] if n >= len(losses) else losses[:n]}


# Devices whose fused AdamW is tested to read found_inf; on others (MPS) the host asks, and waits.
DECIDING_DEVICES = ("cpu", "cuda")


def arm(optimizers: list[torch.optim.Optimizer], skip: Tensor) -> None:
    """Have the next `step` of the optimizers change nothing where `skip` holds.

    found_inf is how torch.amp.GradScaler tells a fused optimizer on the device to leave a step out (documented for custom
    optimizers as `_step_supports_amp_scaling`; AdamW's fused step and `Muon` read it), so the host needs no answer.
    """
    for optimizer in optimizers:
        if skip.device.type in DECIDING_DEVICES:
            optimizer.found_inf = skip.float()  # pyright: ignore[reportAttributeAccessIssue]
        elif bool(skip):
            optimizer.zero_grad(set_to_none=True)  # parameters without a gradient are left alone
