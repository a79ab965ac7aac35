"""The layers of LoRA: linear maps and experts with trained pairs of small matrices beside frozen weights.

R tokens, A active experts per token, N = R * A rows sorted by expert, D model width, F expert width, E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grist_kernels
from grist_model.layers import Linear
from grist_model.moe import Experts
from grist_model.rows import collect, sort_by_expert, spread


@dataclass(frozen=True)
class Pair:
    """What a pair of matrices is like: W becomes W + scale * B A."""

    rank: int
    scale: float


@dataclass(frozen=True)
class Site:
    """A place for a pair: rows `begin` to `end` of a linear map's weight (out, in), or all of a weight (E, in, out) of experts.

    module: that holds the weight; part: what the pair is called there.
    """

    module: str
    part: str
    weight: str
    begin: int
    end: int
    inputs: int
    experts: int | None = None

    @property
    def outputs(self) -> int:
        return self.end - self.begin

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a and b: (r, in) and (out, r); of experts, (E, in, r) and (E, r, out)."""
        if self.experts is None:
            return (rank, self.inputs), (self.outputs, rank)
        return (self.experts, self.inputs, rank), (self.experts, rank, self.outputs)

    @property
    def parameters(self) -> tuple[str, str]:
        """Names of a and b in the state dict."""
        return f"{self.module}.adapters.{self.part}.a", f"{self.module}.adapters.{self.part}.b"


class LowRank(nn.Module):
    """One pair, beside a weight `like` (for type and device); no values yet."""

    def __init__(self, site: Site, pair: Pair, like: Tensor):
        super().__init__()
        self.pair = pair
        shape_a, shape_b = site.shapes(pair.rank)
        self.a = nn.Parameter(torch.empty(shape_a, dtype=like.dtype, device=like.device))
        self.b = nn.Parameter(torch.empty(shape_b, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor, ends_E: Tensor | None = None) -> Tensor:
        """x (..., in) -> (..., out); of experts, rows sorted by expert that end at ends_E."""
        if ends_E is None:
            return F.linear(self.pair.scale * F.linear(x, self.a), self.b)
        low = self.pair.scale * grist_kernels.grouped_matmul(x, self.a, ends_E)
        return grist_kernels.grouped_matmul(low, self.b, ends_E)


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What a pair adds to its weight, (out, in) or (E, in, out), in float32."""
    a, b = a.float(), b.float()
    return scale * (b @ a if a.dim() == 2 else a @ b)


class LoraLinear(Linear):
    """A linear map with a pair for some or all of its rows of outputs; takes over the parameters of the plain one."""

    def __init__(self, base: Linear, adapters: Mapping[str, LowRank], parts: tuple[tuple[str, int], ...]):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.adapters = nn.ModuleDict(adapters)
        self.parts = parts  # names and sizes, in order

    def forward(self, input: Tensor) -> Tensor:
        updates = [
            self.adapters[part](input) if part in self.adapters else input.new_zeros(*input.shape[:-1], size)
            for part, size in self.parts
        ]
        return super().forward(input) + (updates[0] if len(updates) == 1 else torch.cat(updates, -1))


class LoraExperts(Experts):
    """Experts with a pair each for one or both of their matrices; takes over the parameters of the plain ones.

    The pairs are multiplied on the side, so that the frozen weights get no gradients, and small updates are not rounded away in
    bfloat16 sums. That takes the layer apart into grouped products.
    """

    def __init__(self, base: Experts, adapters: Mapping[str, LowRank]):
        nn.Module.__init__(self)
        self.alpha, self.limit = base.alpha, base.limit
        self.w_gate_up, self.w_down = base.w_gate_up, base.w_down
        self.b_gate_up, self.b_down = base.b_gate_up, base.b_down
        self.adapters = nn.ModuleDict(adapters)

    def forward(self, x_RD: Tensor, ids_RA: Tensor, weights_RA: Tensor) -> Tensor:
        order_N, place_RA, ends_E = sort_by_expert(ids_RA, self.w_down.shape[0])
        x_ND = spread(x_RD, order_N, place_RA)
        h_N2F = self._product("w_gate_up", x_ND, self.w_gate_up, ends_E, self.b_gate_up)
        y_NF = grist_kernels.swiglu(h_N2F, alpha=self.alpha, limit=self.limit)
        y_ND = self._product("w_down", y_NF, self.w_down, ends_E, self.b_down)
        weight_N1 = weights_RA.flatten().index_select(0, order_N)[:, None]
        return collect(y_ND.float() * weight_N1, order_N, place_RA).to(x_RD.dtype)

    def _product(self, part: str, x: Tensor, w: Tensor, ends_E: Tensor, bias: Tensor | None) -> Tensor:
        y = grist_kernels.grouped_matmul(x, w, ends_E, bias)
        return y + self.adapters[part](x, ends_E) if part in self.adapters else y
