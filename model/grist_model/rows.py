"""Tokens sorted by expert, and back. R tokens, A active experts per token, N = R * A assignments sorted by expert, D width."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """order_N: the assignment (counted along (R, A)) that stands at each sorted row. place_RA: the sorted row of each
    assignment. ends_E: where each expert's rows end."""

    order_N: Tensor
    place_RA: Tensor
    ends_E: Tensor


def sort_by_expert(ids_RA: Tensor, experts: int) -> Order:
    """A stable sort; nothing waits for the device."""
    flat_N = ids_RA.flatten()
    order_N = flat_N.argsort(stable=True)
    place_RA = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.numel(), device=order_N.device))
    counts_E = flat_N.new_zeros(experts).scatter_add_(0, flat_N, torch.ones_like(flat_N))
    return Order(order_N, place_RA.view(ids_RA.shape), counts_E.cumsum(0))


def spread(x_RD: Tensor, order_N: Tensor, place_RA: Tensor) -> Tensor:
    """(R, D) -> (N, D): a token's row for each of its experts. Not x[order // A], whose gradient is a sum by atomics."""
    return _Spread.apply(x_RD, order_N, place_RA)


def collect(y_ND: Tensor, order_N: Tensor, place_RA: Tensor) -> Tensor:
    """(N, D) -> (R, D): the sum of a token's rows, in float32 and in the order of its experts; the transpose of `spread`."""
    return _Collect.apply(y_ND, order_N, place_RA)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD: Tensor, order_N: Tensor, place_RA: Tensor) -> Tensor:
        ctx.save_for_backward(place_RA)
        return _copies(x_RD, order_N, place_RA)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_ND: Tensor):
        (place_RA,) = ctx.saved_tensors
        return _sums(d_ND, place_RA), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND: Tensor, order_N: Tensor, place_RA: Tensor) -> Tensor:
        ctx.save_for_backward(order_N, place_RA)
        return _sums(y_ND, place_RA)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_RD: Tensor):
        return _copies(d_RD, *ctx.saved_tensors), None, None


def _copies(x_RD: Tensor, order_N: Tensor, place_RA: Tensor) -> Tensor:
    return x_RD[order_N // place_RA.shape[1]]


def _sums(y_ND: Tensor, place_RA: Tensor) -> Tensor:
    wide = torch.float64 if y_ND.dtype == torch.float64 else torch.float32
    return y_ND[place_RA].sum(1, dtype=wide).to(y_ND.dtype)
