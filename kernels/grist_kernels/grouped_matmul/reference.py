"""One matrix product per expert over rows sorted by expert. R rows, E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels.precision import upcast


def grouped_matmul(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Row r of the result is x[r] @ w[e] + bias[e], where e is the expert with offsets[e-1] <= r < offsets[e]; else zero."""
    row_R = torch.arange(x.shape[0], device=x.device)
    starts = torch.cat((offsets.new_zeros(1), offsets[:-1]))
    out = upcast(x).new_zeros(x.shape[0], w.shape[2])
    for e in range(w.shape[0]):
        y = upcast(x) @ upcast(w[e])
        if bias is not None:
            y = y + upcast(bias[e])
        mine_R = (row_R >= starts[e]) & (row_R < offsets[e])
        out = torch.where(mine_R[:, None], y, out)
    return out.to(x.dtype)
