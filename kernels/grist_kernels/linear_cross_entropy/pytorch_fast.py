"""Linear layer and cross entropy in chunks of rows, so that the (R, V) logits never exist all at once.

R rows, C rows of a chunk, D model width, V vocabulary.

For "mean" and "sum" the gradients are made in the forward, while a chunk's logits are at hand, and only scaled by the
incoming scalar in the backward: three matrix products in all, as without chunks. For "none" the incoming gradients differ by
row, so the backward computes the logits again: four. Measured speeds: kernels/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grist_kernels.linear_cross_entropy.chunks import chunks


def fits(hidden: Tensor, weight: Tensor) -> bool:
    """Eager mode, something to compute. To a compiler the reference is one graph that it fuses and plans itself."""
    return hidden.numel() > 0 and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class _Loss:
    """What is asked for; see grist_kernels.linear_cross_entropy."""

    ignore_index: int
    z_loss: float
    softcap: float | None
    label_smoothing: float


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int,
    z_loss: float,
    softcap: float | None,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """As grist_kernels.linear_cross_entropy."""
    targets_R = targets.reshape(-1)
    hidden_RD = hidden.reshape(-1, hidden.shape[-1])
    valid_R = targets_R != ignore_index
    loss = _Loss(ignore_index, z_loss, softcap, label_smoothing)
    if reduction == "none":
        return _PerRow.apply(hidden_RD, weight, targets_R, loss).view(targets.shape)
    total = _Total.apply(hidden_RD, weight, targets_R, loss, torch.is_grad_enabled())
    return total if reduction == "sum" else total / valid_R.sum().clamp(min=1)


class _Total(torch.autograd.Function):
    """Sum over rows; gradients are made in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, loss: _Loss, with_gradients: bool) -> Tensor:
        want_hidden, want_weight = (with_gradients and need for need in ctx.needs_input_grad[:2])
        total = _wide(hidden).new_zeros(())
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_weight = _wide(weight).new_zeros(weight.shape) if want_weight else None
        for rows in chunks(hidden.shape[0], weight.shape[0], _wide_bytes(hidden), hidden.device.type):
            logits = _logits(hidden[rows], weight)
            losses, d_logits = _chunk(logits, targets[rows], loss, None, want_hidden or want_weight)
            total += losses.sum()
            _accumulate(d_logits, hidden[rows], weight, None if d_hidden is None else d_hidden[rows], d_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_total: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * d_total.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * d_total).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


class _PerRow(torch.autograd.Function):
    """One loss a row; the backward computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, loss: _Loss) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.loss = loss
        out = _wide(hidden).new_empty(targets.shape)
        for rows in chunks(hidden.shape[0], weight.shape[0], _wide_bytes(hidden), hidden.device.type):
            out[rows], _ = _chunk(_logits(hidden[rows], weight), targets[rows], loss, None, False)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss: Tensor):
        hidden, weight, targets = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = _wide(weight).new_zeros(weight.shape) if ctx.needs_input_grad[1] else None
        for rows in chunks(hidden.shape[0], weight.shape[0], _wide_bytes(hidden), hidden.device.type):
            _, d_logits = _chunk(_logits(hidden[rows], weight), targets[rows], ctx.loss, d_loss[rows], True)
            _accumulate(d_logits, hidden[rows], weight, None if d_hidden is None else d_hidden[rows], d_weight)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None


def _chunk(
    logits: Tensor, targets: Tensor, loss: _Loss, d_loss: Tensor | None, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The losses (C,) of a chunk's logits (C, V), and the gradient of those logits, times d_loss (C,) if given."""
    valid = targets != loss.ignore_index
    index = targets.where(valid, 0).unsqueeze(1)
    tanh = None
    if loss.softcap is not None:
        tanh = logits.div_(loss.softcap).tanh_()
        logits = tanh * loss.softcap
    log_p = logits.log_softmax(-1)
    # Shifts cancel in every difference; lse itself is what log_softmax subtracted.
    picked = log_p.gather(1, index)
    losses = picked.mul(loss.label_smoothing - 1)
    lse = logits.gather(1, index) - picked
    if loss.label_smoothing:
        losses -= loss.label_smoothing * log_p.mean(-1, keepdim=True)
    if loss.z_loss:
        losses += loss.z_loss * lse.square()
    losses = losses.squeeze(1).masked_fill_(~valid, 0.0)
    if not with_gradient:
        return losses, None
    d_logits = log_p.exp_()
    if loss.z_loss:
        d_logits.mul_(1 + 2 * loss.z_loss * lse)
    if loss.label_smoothing:
        d_logits.sub_(loss.label_smoothing / logits.shape[1])
    d_logits.scatter_add_(1, index, torch.full_like(lse, loss.label_smoothing - 1))
    if tanh is not None:
        d_logits.mul_(tanh.square_().neg_().add_(1))
    if d_loss is not None:
        d_logits.mul_(d_loss.unsqueeze(1))
    if valid.device.type != "cpu" or not valid.all():  # on a GPU, asking would wait for it
        d_logits.masked_fill_(~valid.unsqueeze(1), 0.0)
    return losses, d_logits


def _accumulate(
    d_logits: Tensor | None, hidden: Tensor, weight: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None
) -> None:
    if d_logits is None:
        return
    d_logits = d_logits.to(hidden.dtype)
    if d_hidden is not None:
        torch.mm(d_logits, weight, out=d_hidden)
    if d_weight is None:
        return
    if d_weight.dtype == hidden.dtype:
        d_weight.addmm_(d_logits.T, hidden)
    else:
        d_weight += d_logits.T @ hidden  # each chunk's product is rounded once; the sum over chunks is float32


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return _wide(hidden @ weight.T)


def _wide_bytes(x: Tensor) -> int:
    return max(4, x.element_size())


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
