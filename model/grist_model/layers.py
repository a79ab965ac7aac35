"""The plain layers. They hold no initial values: initialization.py gives those, once, whatever the device and sharding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grist_kernels
from grist_kernels.native import rms_norm as native
from grist_model import few_rows, products
from grist_model.config import ModelConfig


class Linear(nn.Linear):
    """nn.Linear without initial values."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        return products.linear(input, self.weight, self.bias)


class Embedding(nn.Module):
    """nn.Embedding without initial values."""

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, residual: Tensor | None = None):
        """-> y, or (y, x + residual) when a residual is given."""
        if native.fits(x, self.weight, residual):
            y, total = native.rms_norm(x, self.weight, self.eps, residual)
            return y if residual is None else (y, total)
        if few_rows.fits(x) and self.weight.dtype == x.dtype:
            if residual is None:
                return few_rows.rms_norm(x, self.weight, self.eps)
            x = x + residual
            return few_rows.rms_norm(x, self.weight, self.eps), x
        return grist_kernels.rms_norm(x, self.weight, self.eps, residual=residual)


class LayerNorm(nn.Module):
    """Ba et al., 2016, with RMSNorm's face."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, residual: Tensor | None = None):
        """-> y, or (y, x + residual) when a residual is given."""
        if residual is None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        x = x + residual
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps), x


def norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """The normalization of the residual stream."""
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(config.width, config.norm_eps)
