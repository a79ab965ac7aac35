"""The feed-forward half of a block: dense, or a router and its experts.

B batch, T time, D model width, E experts, A active experts per token, F expert width, L layers, R tokens = B * T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grist_kernels
from grist_kernels.native import router as native
from grist_model import native_step
from grist_model.config import ModelConfig
from grist_model.layers import Linear


class LayerStats(NamedTuple):
    """One layer's part of RouterStats: the same sums, without the L axis."""

    tokens_per_expert_E: Tensor
    aux_loss_sum: Tensor
    z_loss_sum: Tensor
    entropy_sum: Tensor


class RouterStats(NamedTuple):
    """Sums over the tokens and sequences of one call, so that they add up over micro-batches and ranks.

    Divide a sum by the number of tokens of the whole step. Gradients flow through the two losses.

    tokens_per_expert_LE: int64, assignments each expert received; (L, 0) in a dense model, where the losses are zero.
    aux_loss_sum: over layers and sequences, E * sum_e f_e P_e * T, with f_e the share of the sequence's A * T
        assignments and P_e the mean probability of expert e in that sequence (Fedus et al., "Switch Transformers",
        2021, taken per sequence as in DeepSeek-V3). Perfect balance gives 1 per layer and token.
    z_loss_sum: over layers and tokens, logsumexp(router logits)^2 (Zoph et al., "ST-MoE", 2022).
    entropy_sum_L: over tokens, the entropy of the router's distribution in nats; without gradient.
    """

    tokens_per_expert_LE: Tensor
    aux_loss_sum: Tensor
    z_loss_sum: Tensor
    entropy_sum_L: Tensor

    @classmethod
    def stack(cls, layers: list[LayerStats]) -> RouterStats:
        counts, aux, z, entropy = (torch.stack(column) for column in zip(*layers, strict=True))
        return cls(counts, aux.sum(), z.sum(), entropy)

    @classmethod
    def empty(cls, layers: int, device: torch.device) -> RouterStats:
        zero = torch.zeros((), device=device)
        counts_LE = torch.zeros(layers, 0, dtype=torch.int64, device=device)
        return cls(counts_LE, zero, zero, torch.zeros(layers, device=device))


class Router(nn.Module):
    """Scores every expert for every token and picks the best A, in float32 whatever the type of the model.

    Weights are the softmax over the chosen A only (GPT-OSS, Mixtral: softmax after top-k, or before it and renormalised, which
    is the same), or with router_weights "all" the chosen ones' part of the softmax over all (OLMoE). With balance "bias"
    the choice, and only the choice, is made on logits + selection_bias (Wang et al., "Auxiliary-Loss-Free Load Balancing",
    2024).
    """

    selection_bias: Tensor | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.active = config.active_experts
        self.over_all = config.router_weights == "all"
        self.weight = nn.Parameter(torch.empty(config.experts, config.width))
        self.bias = nn.Parameter(torch.empty(config.experts)) if config.router_bias else None
        self.register_buffer("selection_bias", torch.zeros(config.experts) if config.balance == "bias" else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # Steps of 0.001 vanish in bfloat16: the bias keeps its float32 values when the model is cast.
        before = self.selection_bias
        super()._apply(fn, recurse)
        if before is not None and self.selection_bias is not None and self.selection_bias.dtype != torch.float32:
            self.selection_bias = before.to(self.selection_bias.device)
        return self

    def forward(self, x_BTD: Tensor, return_stats: bool = False) -> tuple[Tensor, Tensor, LayerStats | None]:
        """-> expert ids (R, A) int64, expert weights (R, A) float32, and the layer's statistics if asked for."""
        if not return_stats and native.fits(x_BTD, self.weight, self.bias):
            return *native.route(x_BTD, self.weight, self.bias, self.selection_bias, self.active, self.over_all), None
        bias_E = None if self.bias is None else self.bias.float()
        logits_BTE = F.linear(x_BTD.float(), self.weight.float(), bias_E)
        if self.selection_bias is None:
            top_BTA, ids_BTA = logits_BTE.topk(self.active, dim=-1)
        else:
            ids_BTA = (logits_BTE.detach() + self.selection_bias).topk(self.active, dim=-1).indices
            top_BTA = logits_BTE.gather(-1, ids_BTA)
        stats = _layer_stats(logits_BTE, ids_BTA) if return_stats else None
        if self.over_all:
            weights_BTA = (top_BTA - logits_BTE.logsumexp(-1, keepdim=True)).exp()
        else:
            weights_BTA = top_BTA.softmax(-1)
        return ids_BTA.flatten(0, 1), weights_BTA.flatten(0, 1), stats


def _layer_stats(logits_BTE: Tensor, ids_BTA: Tensor) -> LayerStats:
    B, T, E = logits_BTE.shape
    A = ids_BTA.shape[-1]
    # scatter_add, not bincount: the latter makes the host wait for the device.
    counts_BE = logits_BTE.new_zeros(B, E)
    counts_BE = counts_BE.scatter_add(1, ids_BTA.reshape(B, T * A), counts_BE.new_ones(()).expand(B, T * A))
    lse_BT = logits_BTE.logsumexp(-1)
    p_BTE = logits_BTE.softmax(-1)
    # E * sum_e f_e P_e * T with f = counts / (A T) and P = p.sum over time / T.
    aux = (counts_BE * p_BTE.sum(1)).sum() * (E / (A * T))
    with torch.no_grad():
        entropy = lse_BT.sum() - torch.dot(p_BTE.flatten(), logits_BTE.flatten())
    return LayerStats(counts_BE.sum(0).to(torch.int64), aux, lse_BT.square().sum(), entropy)


class Experts(nn.Module):
    """The experts' weights, all in one module so that FSDP can shard them as a unit of their own.

    w_gate_up (E, D, 2F) holds [gate | up] halves: on a CPU contiguous halves are cheaper to read than every other
    column.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, width = config.experts, config.width, config.expert_width
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.w_gate_up = nn.Parameter(torch.empty(E, D, 2 * width))
        self.w_down = nn.Parameter(torch.empty(E, width, D))
        self.b_gate_up = nn.Parameter(torch.empty(E, 2 * width)) if config.mlp_bias else None
        self.b_down = nn.Parameter(torch.empty(E, D)) if config.mlp_bias else None

    def forward(self, x_RD: Tensor, ids_RA: Tensor, weights_RA: Tensor) -> Tensor:
        return grist_kernels.moe(
            x_RD,
            ids_RA,
            weights_RA,
            self.w_gate_up,
            self.w_down,
            self.b_gate_up,
            self.b_down,
            alpha=self.alpha,
            limit=self.limit,
        )


class DenseMLP(nn.Module):
    """One expert that every token goes through: a dense model's whole layer, or the shared expert beside others."""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.gate_up = Linear(config.width, 2 * width, bias=config.mlp_bias)
        self.down = Linear(width, config.width, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor, return_stats: bool = False) -> tuple[Tensor, None]:
        whole = native_step.mlp(self, x_BTD)
        if whole is not None:
            return whole, None
        return self.down(grist_kernels.swiglu(self.gate_up(x_BTD), alpha=self.alpha, limit=self.limit)), None


class PlainMLP(nn.Module):
    """Up, GELU, down (GPT-2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.up = Linear(config.width, config.expert_width, bias=config.mlp_bias)
        self.down = Linear(config.expert_width, config.width, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor, return_stats: bool = False) -> tuple[Tensor, None]:
        return self.down(F.gelu(self.up(x_BTD), approximate=self.approximate)), None


def feed_forward(config: ModelConfig) -> MoE | DenseMLP | PlainMLP:
    """The second half of a block."""
    if config.experts:
        return MoE(config)
    return DenseMLP(config, config.expert_width) if config.activation == "swiglu" else PlainMLP(config)


class MoE(nn.Module):
    """Router, experts and, where the config asks for one, a shared expert."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = DenseMLP(config, config.shared_expert_width) if config.shared_expert_width else None

    def forward(self, x_BTD: Tensor, return_stats: bool = False) -> tuple[Tensor, LayerStats | None]:
        ids_RA, weights_RA, stats = self.router(x_BTD, return_stats)
        out_BTD = self.experts(x_BTD.flatten(0, 1), ids_RA, weights_RA).view(x_BTD.shape)
        if self.shared is not None:
            out_BTD = out_BTD + self.shared(x_BTD)[0]
        return out_BTD, stats
