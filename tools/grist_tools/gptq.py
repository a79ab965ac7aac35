"""int4 that minimises the error of a layer's outputs instead of its weights: GPTQ (Frantar et al., 2022, arXiv:2210.17323).

O outputs, I inputs, G groups of g inputs, R rows of activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels.quantized import Int4Weight
from grist_tools.quantize import finite
from grist_tools.quantize_int4 import Grid, check_group, grid_of, packed

DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it
BLOCK = 128  # columns whose error is handed on to the rest in one product


class Hessian:
    """sum of x x^T over activations, (I, I) float32; half the Hessian of the squared error of y = W x in each row of W."""

    def __init__(self, inputs: int):
        self.sum_II = torch.zeros(inputs, inputs)

    def add(self, x: Tensor) -> None:
        """Activations (..., I)."""
        x_RI = x.detach().reshape(-1, x.shape[-1]).float()
        self.sum_II.addmm_(x_RI.T, x_RI)


def quantise_int4_gptq(
    weight_OI: Tensor,
    hessian_II: Tensor,
    group: int = 128,
    *,
    symmetric: bool = True,
    activation_order: bool = False,
    damping: float = DAMPING,
    scale_type: torch.dtype = torch.bfloat16,
) -> Int4Weight:
    """Column after column is rounded, and the columns after it take over what that changed in the outputs.

    Each group's scale comes from the weights as they are when its first column is reached. With activation_order the columns of
    large activations go first; the groups are those of the inputs' own order all the same, their scales from the weights as
    given, so that no reader needs to know. An input that is always zero has no influence, and is rounded like any other.

    Raises ValueError for values that are not finite, and for shapes or groups that do not fit.
    """
    O, I = weight_OI.shape  # noqa: E741 (the legend's letters)
    check_group(I, group)
    if tuple(hessian_II.shape) != (I, I):
        raise ValueError(f"the Hessian of {I} inputs must be {(I, I)}, but is {tuple(hessian_II.shape)}")
    if not hessian_II.isfinite().all():
        raise ValueError("GPTQ: the activations have values that are not finite (NaN or infinite)")
    w_OI = finite(weight_OI, "GPTQ").clone()
    grid = grid_of(w_OI.unflatten(-1, (-1, group)), symmetric=symmetric, search=True)
    order_I = hessian_II.diagonal().argsort(descending=True, stable=True) if activation_order else torch.arange(I)
    update_II = _inverse_factor(hessian_II[order_I][:, order_I], damping)
    # Transposed, so that the weights of one input lie side by side.
    w_IO, codes_IO = w_OI.T[order_I].contiguous(), torch.empty_like(w_OI.T)
    for low in range(0, I, BLOCK):
        high = min(low + BLOCK, I)
        errors_IO = torch.empty(high - low, O)
        for column in range(low, high):
            at = int(order_I[column]) // group
            if not activation_order and column % group == 0:  # groups divide blocks: all its columns are up to date
                _set_grid(grid, at, w_IO[column : column + group].T, symmetric)
            scale_O, zero_O = grid.scale[:, at], grid.zero[:, at]
            codes_O = Grid(scale_O, zero_O).codes(w_IO[column, :, None])[:, 0]
            codes_IO[order_I[column]] = codes_O
            error_O = (w_IO[column] - (codes_O - zero_O) * scale_O) / update_II[column, column]
            w_IO[column:high].addr_(update_II[column, column:high], error_O, alpha=-1)
            errors_IO[column - low] = error_O
        w_IO[high:].addmm_(update_II[low:high, high:].T, errors_IO, alpha=-1)
    return packed(codes_IO.T.contiguous(), grid, symmetric=symmetric, scale_type=scale_type)


def _inverse_factor(hessian_II: Tensor, damping: float) -> Tensor:
    """(I, I) upper triangular, float32: U with U^T U = H^-1, whose rows are the updates of section 3.3, step 3."""
    h_II = hessian_II.double()
    diagonal = h_II.diagonal()
    unused = diagonal == 0
    h_II = h_II + torch.diag(damping * diagonal.mean() + unused.double())
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(h_II))
    return torch.linalg.cholesky(inverse_II, upper=True).float()


def _set_grid(grid: Grid, at: int, columns: Tensor, symmetric: bool) -> None:
    found = grid_of(columns.unsqueeze(-2), symmetric=symmetric, search=True)
    grid.scale[:, at], grid.zero[:, at] = found.scale[:, 0], found.zero[:, 0]
