"""Tensors of any shape as rows, for kernels that treat a row at a time: views are read where they lie, without a copy.

Row r of x (..., D) begins at (r // inner) * outer_stride + (r % inner) * inner_stride elements. Two strides describe all that
models make: whole tensors, slices of a fused projection, heads of queries seen as rows.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """A tensor with the strides of its rows, in elements; `inner` is common to all tensors of one launch."""

    tensor: Tensor
    outer_stride: int
    inner_stride: int


def as_rows(*tensors: Tensor) -> tuple[int, list[Rows]]:
    """Describe tensors of one shape (..., D) as rows: (inner, one Rows each). What two strides cannot express, or has a last
    axis with gaps, is copied."""
    width = tensors[0].shape[-1]
    if all(tensor.is_contiguous() for tensor in tensors):
        return 1, [Rows(tensor, width, 0) for tensor in tensors]
    splits = [_split(tensor) for tensor in tensors]
    inner = max((split[0] for split in splits if split), default=1)
    found = []
    for tensor, split in zip(tensors, splits, strict=True):
        if split is None or split[0] not in (1, inner):
            found.append(Rows(tensor.contiguous(), inner * width, width))
        elif split[0] == inner:
            found.append(Rows(tensor, split[1], split[2]))
        else:
            found.append(Rows(tensor, inner * split[1], split[1]))
    return inner, found


def _split(x: Tensor) -> tuple[int, int, int] | None:
    """(inner, outer stride, inner stride), with inner = 1 where one stride is enough; None if x must be copied."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    if x.numel() == 0:
        return 1, x.shape[-1], 0
    groups: list[tuple[int, int]] = []  # (size, stride) of merged axes, innermost first
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if groups and stride == groups[-1][0] * groups[-1][1]:
            groups[-1] = (groups[-1][0] * size, groups[-1][1])
        else:
            groups.append((size, stride))
    if len(groups) > 2:
        return None
    if len(groups) < 2:
        return 1, groups[0][1] if groups else x.shape[-1], 0
    return groups[0][0], groups[1][1], groups[0][1]
