"""Long runs in few columns: rows of figures brought together by step, as many as a picture has room for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grist_tools.report_axis import LEFT, RIGHT, Axis

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLUMNS = (RIGHT - LEFT) // 2


def n_columns(steps: Sequence[int]) -> int:
    return min(COLUMNS, len(steps))


def cells(steps: Sequence[int], values: NDArray[Any], x: Axis, worst: bool = False) -> tuple[list[int], NDArray[Any]]:
    """Ascending steps (N) and values (N, P) -> columns (C) that have a step, values (C, P): the mean of the finite values of
    a column's steps, or their highest; NaN where there is none."""
    import numpy as np

    columns = n_columns(steps)
    at = np.clip(((np.array(steps) - x.low) / (x.high - x.low) * columns).astype(int), 0, columns - 1)
    starts = np.flatnonzero(np.diff(at, prepend=-1))
    finite = np.isfinite(values)
    if worst:
        found = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
        found[found == -np.inf] = np.nan
    else:
        count = np.add.reduceat(finite.astype(float), starts)
        found = np.add.reduceat(np.where(finite, values, 0.0), starts) / np.where(count > 0, count, np.nan)
    return at[starts].tolist(), found
