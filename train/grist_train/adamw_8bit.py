"""AdamW with its averages in 8 bits, a quarter of the memory (Dettmers et al. 2022, arXiv:2110.02861), by torchao.

Checkpoints hold the averages in float32: they load on any number of ranks, where blocks of 256 values that share a scale would
not, and a run with averages in 32 bits may go on with 8. Going on from a checkpoint rounds the averages once more: the code of
-1 stands for -0.993, so a block whose largest value is negative gets another scale. Losses agree closely then, not to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

try:
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        "optimizer.state_bits 8 needs the package torchao: pip install 'torchao>=0.18', or set it to 32"
    ) from error

AVERAGES = {"exp_avg": True, "exp_avg_sq": False}  # whether they have a sign


class GuardedAdamW8bit(AdamW8bit):
    """torchao's AdamW8bit, which leaves a step out where `found_inf` is set and not 0 (step_guard.arm), and whose state dict is
    that of AdamW.

    The step is no fused one that could decide on the device: the host asks, and waits for the gradients once a step. It is
    compiled for every shape of parameter, and computes in float32. A parameter keeps averages in float32 where a rank has less
    than 4096 values of it, or a number of values that 256 does not divide.
    """

    def __init__(self, params: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, betas=betas, eps=eps)
        self.register_state_dict_post_hook(_widen)
        self.register_load_state_dict_post_hook(_narrow)

    def step(self, closure=None):
        skip = getattr(self, "found_inf", None)
        if skip is not None and skip.item():
            return None
        return super().step(closure)


def _widen(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Averages in float32, learning rates as numbers. The optimizer keeps what it has."""
    groups = [group | {"lr": float(group["lr"])} for group in state_dict["param_groups"]]
    state = {
        key: {name: _dequantized(value) if name in AVERAGES else value for name, value in of_parameter.items()}
        for key, of_parameter in state_dict["state"].items()
    }
    return {"state": state, "param_groups": groups}


def _dequantized(average: torch.Tensor) -> torch.Tensor:
    local = _local(average)
    if not isinstance(local, OptimState8bit):
        return average
    wide = local.dequantize()
    if not isinstance(average, DTensor):
        return wide
    return DTensor.from_local(
        wide,
        average.device_mesh,
        average.placements,
        run_check=False,
        shape=average.shape,
        stride=average.stride(),
    )


def _narrow(optimizer: torch.optim.Optimizer) -> None:
    """The opposite, after values in float32 were loaded."""
    assert isinstance(optimizer, GuardedAdamW8bit)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
    for parameter, state in optimizer.state.items():
        for name, signed in AVERAGES.items():
            buffer = optimizer._new_buffer(parameter, signed)
            _local(buffer).copy_(_local(state[name]))
            state[name] = buffer


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
