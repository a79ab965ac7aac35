"""Groups of inputs in four bits with a scale, and perhaps a zero point: round to nearest, with a search for the clipping.

O outputs, I inputs, G groups of g inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grist_kernels.quantized import INT4_GROUPS, INT4_MIDDLE, SCALE_TYPES, Int4Weight, pack_nibbles
from grist_tools.quantize import SMALLEST_SCALE, finite, nearest_bfloat16

LARGEST_CODE = 15
# The largest magnitude (symmetric) or the whole range divided by the scale. The first loses nothing to clipping; one of 7 or 8,
# and 13 to 15, finds a dequantised weight's own scale again; the rest clip up to two fifths of the range.
_SYMMETRIC = (7.0, 7.25, 7.5, 7.75, 8.0, 8.5, 9.0, 9.5, 10.0, 11.0, 12.0)
_ASYMMETRIC = (15.0, 14.0, 13.0, 15.5, 16.0, 17.0, 18.0, 19.0, 20.0, 22.0, 24.0)


class Grid(NamedTuple):
    """The 16 numbers that a group can have: (code - zero) * scale. Both (..., G) float32."""

    scale: Tensor
    zero: Tensor

    def codes(self, values: Tensor) -> Tensor:
        """(..., G, g) -> codes as float32."""
        codes = (values / self.scale.unsqueeze(-1)).round() + self.zero.unsqueeze(-1)
        return codes.clamp(0, LARGEST_CODE)

    def values(self, codes: Tensor) -> Tensor:
        return (codes - self.zero.unsqueeze(-1)) * self.scale.unsqueeze(-1)


def quantise_int4(
    weight: Tensor,
    group: int = 128,
    *,
    symmetric: bool = True,
    search: bool = True,
    scale_type: torch.dtype = torch.bfloat16,
) -> Int4Weight:
    """(..., O, I) -> Int4Weight. Without `search` every value is off by at most half a scale; with it, the scale of each group
    is the one among eleven that makes its squared error smallest, at the cost of clipping the largest values.

    Raises ValueError for values that are not finite, for a group other than 32, 64 or 128 or that does not divide I.
    """
    check_group(weight.shape[-1], group)
    values = finite(weight, "int4").unflatten(-1, (-1, group))
    grid = grid_of(values, symmetric=symmetric, search=search)
    return packed(grid.codes(values).flatten(-2), grid, symmetric=symmetric, scale_type=scale_type)


def packed(codes: Tensor, grid: Grid, *, symmetric: bool, scale_type: torch.dtype) -> Int4Weight:
    """codes (..., O, I) and grids (..., O, G) as they are stored."""
    if scale_type not in SCALE_TYPES:
        raise ValueError(f"scale_type must be {' or '.join(map(str, SCALE_TYPES))}, but is {scale_type}")
    zero = None if symmetric else grid.zero.to(torch.uint8)
    return Int4Weight(pack_nibbles(codes.to(torch.uint8)), grid.scale.to(scale_type), zero)


def grid_of(values: Tensor, *, symmetric: bool, search: bool) -> Grid:
    """The grid of every group, values (..., G, g) float32 -> (..., G)."""
    grids = (_grid(values, divisor, symmetric) for divisor in (_SYMMETRIC if symmetric else _ASYMMETRIC))
    best = next(grids)
    if not search:
        return best
    error = _squared_error(values, best)
    for grid in grids:
        found = _squared_error(values, grid)
        better = found < error
        best = Grid(*(torch.where(better, new, old) for new, old in zip(grid, best, strict=True)))
        error = torch.where(better, found, error)
    return best


def _grid(values: Tensor, divisor: float, symmetric: bool) -> Grid:
    if symmetric:
        scale = nearest_bfloat16(values.abs().amax(-1) / divisor)
        return Grid(scale, torch.full_like(scale, INT4_MIDDLE))
    low, high = values.amin(-1).clamp_max(0.0), values.amax(-1).clamp_min(0.0)  # zero itself has a code
    scale = _bfloat16_above((high - low) / divisor)
    # Of the part of the range that is kept, clipped alike at both ends.
    zero = (-low / (high - low).clamp_min(SMALLEST_SCALE) * min(divisor, LARGEST_CODE)).round()
    return Grid(scale, zero if divisor > LARGEST_CODE else (-low / scale).round().clamp_max(LARGEST_CODE))


def _bfloat16_above(scale: Tensor) -> Tensor:
    """The smallest number of bfloat16 that is not below: fifteen steps then reach over the whole range."""
    nearest = nearest_bfloat16(scale)
    next_up = (nearest.bfloat16().view(torch.int16) + 1).view(torch.bfloat16).float()
    return torch.where(nearest < scale, next_up, nearest)


def _squared_error(values: Tensor, grid: Grid) -> Tensor:
    return (grid.values(grid.codes(values)) - values).square().sum(-1)


def check_group(inputs: int, group: int) -> None:
    """Raises ValueError for a group that is not stored, or that does not divide the inputs."""
    if group not in INT4_GROUPS:
        raise ValueError(f"a group of int4 must be {', '.join(map(str, INT4_GROUPS))} inputs, but is {group}")
    if inputs % group:
        fitting = [str(each) for each in INT4_GROUPS if not inputs % each]
        hint = f"take {' or '.join(fitting)}" if fitting else "int8 and fp8 have no groups"
        raise ValueError(f"groups of {group} do not divide {inputs} inputs: {hint}")
