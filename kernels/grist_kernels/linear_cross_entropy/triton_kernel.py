"""Linear layer and cross entropy for a GPU: the products by the vendor's library, everything between them in Triton, in place.

R rows, C rows of a chunk, D model width, V vocabulary. A chunk's logits are made, turned into their own gradient where they lie
(cross_entropy_kernel.py), and multiplied into both gradients while they are at hand: three products in all. Chunks have
thousands of rows: with hundreds the products starve, and dweight, V x D in float32, would be read and written for each. Nothing
waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels.linear_cross_entropy.chunks import chunks
from grist_kernels.linear_cross_entropy.cross_entropy_kernel import (
    BUDGETS,
    CANDIDATES,
    FORMULAS,
    SIZES,
    cross_entropy_,
    total,
)
from grist_kernels.two_faces import differentiable, faces

__all__ = ["BUDGETS", "CANDIDATES", "FORMULAS", "SIZES", "linear_cross_entropy"]


def _logits_buffer(hidden: Tensor, vocabulary: int, stretches: list[slice]) -> Tensor:
    """(C, V) for the longest chunk, with rows that begin on 32 bytes whatever V is: odd rows cannot be read as vectors."""
    rows = max((stretch.stop - stretch.start for stretch in stretches), default=0)
    padded = -(-vocabulary // 16) * 16
    return torch.empty((rows, padded), dtype=hidden.dtype, device=hidden.device)[:, :vocabulary]


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a.T @ b, or total += a.T @ b: float32 all the way, whatever the type of a and b."""
    if a.dtype == torch.float32:
        torch.mm(a.T, b, out=total) if first else total.addmm_(a.T, b)
    elif a.device.type == "cuda":
        if first:
            torch.mm(a.T, b, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, a.T, b, out_dtype=torch.float32, out=total)
    else:  # only CUDA multiplies bfloat16 into float32; products of two bfloat16 are exact in float32
        torch.mm(a.T.float(), b.float(), out=total) if first else total.addmm_(a.T.float(), b.float())


def _losses_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, d_loss: Tensor | None,
    ignore_index: int, z_loss: float, softcap: float | None, label_smoothing: float,
    *, with_loss: bool, want_hidden: bool, want_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Fill losses and lse (R,) if with_loss; return (d_hidden (R, D), d_weight (V, D) float32) where wanted."""
    R, V = hidden.shape[0], weight.shape[0]
    stretches = chunks(R, V, hidden.element_size(), hidden.device.type)
    buffer = _logits_buffer(hidden, V, stretches)
    d_hidden = torch.empty_like(hidden) if want_hidden else None
    d_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device) if want_weight else None
    if d_weight is not None and R == 0:
        d_weight.zero_()
    for number, rows in enumerate(stretches):
        logits = torch.mm(hidden[rows], weight.T, out=buffer[: rows.stop - rows.start])
        cross_entropy_(
            logits, targets[rows], losses[rows], lse[rows], None if d_loss is None else d_loss[rows],
            with_loss=with_loss, with_gradient=want_hidden or want_weight, ignore_index=ignore_index, z_loss=z_loss,
            softcap=softcap, label_smoothing=label_smoothing,
        )  # fmt: skip
        if d_hidden is not None:
            torch.mm(logits, weight, out=d_hidden[rows])
        if d_weight is not None:
            _add_product(d_weight, logits, hidden[rows], first=number == 0)
    return d_hidden, d_weight


def _float32_rows(hidden: Tensor) -> Tensor:
    return torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)


def _total(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, softcap: float | None,
    label_smoothing: float, mean: bool, want_hidden: bool, want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, the factor from the sum to it, gradients of the sum); the gradients are made here, while the logits exist."""
    losses, lse = _float32_rows(hidden), _float32_rows(hidden)
    d_hidden, d_weight = _losses_and_gradients(
        hidden, weight, targets, losses, lse, None, ignore_index, z_loss, softcap, label_smoothing,
        with_loss=True, want_hidden=want_hidden, want_weight=want_weight,
    )  # fmt: skip
    return *total(losses, targets, ignore_index, mean), _or_empty(d_hidden, hidden), _or_empty(d_weight, losses)


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A library op returns tensors only."""
    return like.new_empty(0) if gradient is None else gradient


def _total_backward(
    d_total: Tensor, factor: Tensor, d_hidden: Tensor, d_weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    scale = d_total * factor
    return d_hidden * scale, torch.mul(d_weight, scale, out=torch.empty_like(d_weight, dtype=dtype))


def _per_row(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, softcap: float | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, lse), each (R,) float32."""
    losses, lse = _float32_rows(hidden), _float32_rows(hidden)
    _losses_and_gradients(
        hidden, weight, targets, losses, lse, None, ignore_index, z_loss, softcap, label_smoothing,
        with_loss=True, want_hidden=False, want_weight=False,
    )  # fmt: skip
    return losses, lse


def _per_row_backward(
    d_loss: Tensor, lse: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float,
    softcap: float | None, label_smoothing: float, want_hidden: bool, want_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The logits again, from which lse (R,) makes gradients in one walk."""
    d_hidden, d_weight = _losses_and_gradients(
        hidden, weight, targets, lse, lse, d_loss.contiguous(), ignore_index, z_loss, softcap, label_smoothing,
        with_loss=False, want_hidden=want_hidden, want_weight=want_weight,
    )  # fmt: skip
    return _or_empty(d_hidden, hidden), _or_empty(d_weight, lse).to(weight.dtype)


def _fake_total(
    hidden, weight, targets, ignore_index, z_loss, softcap, label_smoothing, mean, want_hidden, want_weight
):
    scalar = hidden.new_empty((), dtype=torch.float32)
    d_hidden = hidden.new_empty(hidden.shape if want_hidden else (0,))
    d_weight = weight.new_empty(weight.shape if want_weight else (0,), dtype=torch.float32)
    return scalar, torch.empty_like(scalar), d_hidden, d_weight


def _fake_per_row_backward(d_loss, lse, hidden, weight, *rest):
    want_hidden, want_weight = rest[-2:]
    return hidden.new_empty(hidden.shape if want_hidden else (0,)), weight.new_empty(
        weight.shape if want_weight else (0,)
    )


_OPTIONS = "int ignore_index, float z_loss, float? softcap, float label_smoothing"
_TOTAL = faces(
    f"linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, {_OPTIONS}, bool mean, bool want_hidden, "
    "bool want_weight) -> (Tensor, Tensor, Tensor, Tensor)",
    _total,
    _fake_total,
)
_TOTAL_BACKWARD = faces(
    "linear_cross_entropy_backward(Tensor d_total, Tensor factor, Tensor d_hidden, Tensor d_weight, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    _total_backward,
    lambda d_total, factor, d_hidden, d_weight, dtype: (
        d_hidden.new_empty(d_hidden.shape),
        d_weight.new_empty(d_weight.shape, dtype=dtype),
    ),
)
_PER_ROW = faces(
    f"linear_cross_entropy_rows(Tensor hidden, Tensor weight, Tensor targets, {_OPTIONS}) -> (Tensor, Tensor)",
    _per_row,
    lambda hidden, *_: tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(2)),
)
_PER_ROW_BACKWARD = faces(
    "linear_cross_entropy_rows_backward(Tensor d_loss, Tensor lse, Tensor hidden, Tensor weight, Tensor targets, "
    f"{_OPTIONS}, bool want_hidden, bool want_weight) -> (Tensor, Tensor)",
    _per_row_backward,
    _fake_per_row_backward,
)


def _save_total(ctx, inputs, output) -> None:
    ctx.dtype, ctx.wanted = inputs[1].dtype, inputs[-2:]
    ctx.save_for_backward(*output[1:])


def _total_gradients(ctx, run, d_total, *_):
    if d_total is None:
        return (None,) * 10
    d_hidden, d_weight = run(d_total, *ctx.saved_tensors, ctx.dtype)
    want_hidden, want_weight = ctx.wanted
    return d_hidden if want_hidden else None, d_weight if want_weight else None, *(None,) * 8


def _save_per_row(ctx, inputs, output) -> None:
    hidden, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(output[1], hidden, weight, targets)


def _per_row_gradients(ctx, run, d_loss, _):
    if d_loss is None:
        return (None,) * 7
    want = ctx.needs_input_grad[:2]
    gradients = run(d_loss, *ctx.saved_tensors, *ctx.options, *want)
    return *(gradient if wanted else None for gradient, wanted in zip(gradients, want, strict=True)), *(None,) * 5


_totalled = differentiable(_TOTAL, _TOTAL_BACKWARD, _save_total, _total_gradients)
_by_row = differentiable(_PER_ROW, _PER_ROW_BACKWARD, _save_per_row, _per_row_gradients)


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
    rows, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    options = (ignore_index, float(z_loss), None if softcap is None else float(softcap), float(label_smoothing))
    if reduction == "none":
        return _by_row(rows, weight, flat_targets, *options)[0].view(targets.shape)
    want = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (rows, weight)]
    return _totalled(rows, weight, flat_targets, *options, reduction == "mean", *want)[0]
