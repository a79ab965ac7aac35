"""The unembedding and the loss in one: the logits never exist all at once."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels import backend
from grist_kernels.linear_cross_entropy import pytorch_fast, reference

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of logits = hidden (..., D) @ weight (V, D)^T against targets (...) int64, in natural units (nats).

    Per row, with lse = logsumexp(logits):
        (1 - label_smoothing) * (lse - logits[target]) + label_smoothing * (lse - mean(logits)) + z_loss * lse^2
    softcap=c first replaces the logits by c * tanh(logits / c) (Gemma 2). z_loss is PaLM's penalty on the log partition
    function. Rows whose target is ignore_index count for nothing and get gradient zero.

    reduction "sum" and "mean" give a scalar, "none" the shape of targets. "mean" divides by the number of rows that are not
    ignored, and is 0 with zero gradients when there is none. float32 (float64 for float64 inputs). Differentiable in hidden and
    weight.

    Raises ValueError if shapes, types or options do not fit, and on a CPU if a target is out of range. On a GPU, where asking
    would wait for the device, the loss of such a row is NaN.
    """
    _check(hidden, weight, targets)
    _check_options(softcap, label_smoothing, z_loss, reduction)
    options = {
        "ignore_index": ignore_index,
        "z_loss": z_loss,
        "softcap": softcap,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    cannot = backend.cannot_take("linear_cross_entropy", hidden)
    choice = backend.implementation("linear_cross_entropy", hidden.device.type, cannot)
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(targets, ignore_index, weight.shape[0])
    if choice == "triton":
        return backend.triton_kernel("linear_cross_entropy").linear_cross_entropy(hidden, weight, targets, **options)
    if choice == "pytorch" and pytorch_fast.fits(hidden, weight):
        return pytorch_fast.linear_cross_entropy(hidden, weight, targets, **options)
    return reference.linear_cross_entropy(hidden, weight, targets, **options)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "linear_cross_entropy: hidden must be (..., D) and weight (V, D), "
            f"but are {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            "linear_cross_entropy: hidden and weight must have one floating type, "
            f"but are {hidden.dtype} and {weight.dtype}"
        )
    if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: targets must be {tuple(hidden.shape[:-1])} int64 to match hidden, "
            f"but is {tuple(targets.shape)} {targets.dtype}"
        )


def _check_range(targets: Tensor, ignore_index: int, vocabulary: int) -> None:
    inside = targets.where(targets != ignore_index, 0)
    low, high = inside.aminmax() if inside.numel() else (0, 0)
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"linear_cross_entropy: targets must be in [0, {vocabulary}) or ignore_index, "
            f"but range from {int(low)} to {int(high)}"
        )


def _check_options(softcap: float | None, label_smoothing: float, z_loss: float, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"linear_cross_entropy: reduction must be one of {', '.join(REDUCTIONS)}, but is {reduction!r}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"linear_cross_entropy: softcap must be positive or None, but is {softcap}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing must be in [0, 1), but is {label_smoothing}")
    if z_loss < 0:
        raise ValueError(f"linear_cross_entropy: z_loss must not be negative, but is {z_loss}")
