"""Comparisons that say what was compared, how far off it was, and where."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(
    name: str, got: Tensor, want: Tensor, *, atol: float = 0.0, rtol: float = 0.0, allowed: float | None = None
) -> None:
    """Fail unless |got - want| <= atol + rtol * |want| everywhere; `allowed` stands for atol and means the same.

    Shapes must be equal, types need not be: both are compared in float64. Infinities must agree exactly, NaN is never close.
    With no tolerance at all, equality is demanded.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, but expected {tuple(want.shape)}"
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert not want.isnan().any(), f"{name}: the expected value has {int(want.isnan().sum())} NaN; the test is at fault"
    assert not got.isnan().any(), f"{name}: {int(got.isnan().sum())} of {got.numel()} elements are NaN"
    error = torch.where(got == want, 0.0, (got - want).abs())  # equal infinities differ by nothing
    limit = (atol if allowed is None else allowed) + torch.where(want.isinf(), 0.0, rtol * want.abs())
    excess = error - limit
    if error.numel() == 0 or (excess <= 0).all():
        return
    worst = int(excess.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape))
    raise AssertionError(
        f"{name}: {int((excess > 0).sum())} of {got.numel()} elements are off; worst at {index}: "
        f"got {got.flatten()[worst]:.9g}, expected {want.flatten()[worst]:.9g}, "
        f"error {error.flatten()[worst]:.3g}, allowed {limit.expand_as(error).flatten()[worst]:.3g}"
    )
