"""Layers whose weights stay packed while they run: what `load(..., quantized=True)` puts in place of Linear and Experts.

R tokens, D model width, E experts, A active experts per token, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

import grist_kernels
from grist_kernels.native import moe as native_moe
from grist_kernels.quantized import Mxfp4Weight, PackedWeight
from grist_model.config import ModelConfig


class _Packed(nn.Module):
    """Packed weights by name. Their parts are buffers, which move between devices and keep their types; they are in no state
    dict, since they are no values that anybody could train or save."""

    def __init__(self, **weights: PackedWeight):
        super().__init__()
        self._kinds = {name: type(weight) for name, weight in weights.items()}
        for name, weight in weights.items():
            for part, tensor in weight.tensors.items():
                self.register_buffer(f"{name}_{part}", tensor, persistent=False)
        self._weights = weights

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Packed:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, part in before.items():  # a scale, or an fp8 weight, is not to be cast
            moved = cast(Tensor, getattr(self, name))
            if moved.dtype != part.dtype:
                setattr(self, name, part.to(moved.device))
        # Made here, not in forward: checking parts takes longer than a small product.
        self._weights = {
            name: kind(**{part: getattr(self, f"{name}_{part}") for part in self._weights[name].tensors})
            for name, kind in self._kinds.items()
        }
        return self


class QuantizedLinear(_Packed):
    """grist_model.layers.Linear with a packed weight (O, I). The bias (O,), if there is one, is a parameter like any other."""

    bias: nn.Parameter | None

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None = None):
        super().__init__(weight=weight)
        self.bias = bias

    @property
    def packed(self) -> PackedWeight:
        return self._weights["weight"]

    def forward(self, input: Tensor) -> Tensor:
        return grist_kernels.quantized_linear(input, self._weights["weight"], self.bias)

    def extra_repr(self) -> str:
        outputs, inputs = self.packed.shape
        return f"{inputs}, {outputs}, {self.packed.kind}"


class QuantizedExperts(_Packed):
    """grist_model.moe.Experts with packed weights, outputs first: gate_up (E, 2F, D) of [gate | up] halves, down (E, D, F).

    A few tokens on a CPU run in C (grist_kernels.native). MXFP4 runs as grist_kernels.moe_mxfp4. The other kinds go through the
    chosen experts one by one, each as two grist_kernels.quantized_linear: on a GPU the host waits for the choice.
    """

    def __init__(self, config: ModelConfig, gate_up: PackedWeight, down: PackedWeight):
        super().__init__(gate_up=gate_up, down=down)
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        (experts, wide, _), width = gate_up.shape, down.shape[1]
        self.b_gate_up, self.b_down = None, None
        if config.mlp_bias:
            self.b_gate_up = nn.Parameter(torch.empty(experts, wide, device="meta"), requires_grad=False)
            self.b_down = nn.Parameter(torch.empty(experts, width, device="meta"), requires_grad=False)

    def forward(self, x_RD: Tensor, ids_RA: Tensor, weights_RA: Tensor) -> Tensor:
        gate_up, down = self._weights["gate_up"], self._weights["down"]
        options: dict[str, Any] = {"alpha": self.alpha, "limit": self.limit}
        if isinstance(gate_up, Mxfp4Weight) and isinstance(down, Mxfp4Weight):
            packed = (gate_up.blocks, gate_up.scales, down.blocks, down.scales)
            return grist_kernels.moe_mxfp4(x_RD, ids_RA, weights_RA, *packed, self.b_gate_up, self.b_down, **options)
        if native_moe.fits_packed(x_RD, ids_RA, gate_up, down):
            given = (x_RD, ids_RA, weights_RA, gate_up, down, self.b_gate_up, self.b_down)
            return native_moe.moe(*given, **options, interleaved=False)
        return self._one_by_one(x_RD, ids_RA, weights_RA)

    def _one_by_one(self, x_RD: Tensor, ids_RA: Tensor, weights_RA: Tensor) -> Tensor:
        gate_up, down = self._weights["gate_up"], self._weights["down"]
        out_RD = torch.zeros_like(x_RD, dtype=torch.float32)
        for expert in ids_RA.unique().tolist():
            rows, choice = (ids_RA == expert).nonzero(as_tuple=True)
            biases = [None if bias is None else bias[expert] for bias in (self.b_gate_up, self.b_down)]
            h = grist_kernels.quantized_linear(x_RD[rows], _of(gate_up, expert), biases[0])
            act = grist_kernels.swiglu(h, alpha=self.alpha, limit=self.limit)
            y = grist_kernels.quantized_linear(act, _of(down, expert), biases[1])
            out_RD.index_add_(0, rows, y.float() * weights_RA[rows, choice].float().unsqueeze(-1))
        return out_RD.to(x_RD.dtype)


def _of(weight: PackedWeight, expert: int) -> PackedWeight:
    return weight.mapped(lambda part: part[expert])


def is_quantized(model: nn.Module) -> bool:
    """Whether some of its weights are packed."""
    return any(isinstance(module, _Packed) for module in model.modules())
