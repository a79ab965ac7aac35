"""The comparison that every other test leans on must be able to fail."""

from __future__ import annotations

import math

import pytest
import torch
from assertions import assert_close


def test_equal_tensors_pass_without_tolerance():
    assert_close("x", torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.inf]))
    assert_close("empty", torch.zeros(0, 3), torch.zeros(0, 3))


@pytest.mark.parametrize("tolerance", [{"atol": 0.01}, {"rtol": 0.01}, {"allowed": 0.01}, {}])
def test_an_error_beyond_the_tolerance_fails_and_names_its_place(tolerance):
    want = torch.ones(2, 3)
    got = want.clone()
    got[1, 2] = 1.5
    with pytest.raises(AssertionError, match=r"dq: 1 of 6 elements are off; worst at \(1, 2\): got 1.5, expected 1, "):
        assert_close("dq", got, want, **tolerance)


def test_an_error_within_the_tolerance_passes():
    assert_close("x", torch.tensor([100.5]), torch.tensor([100.0]), rtol=0.01)
    assert_close("x", torch.tensor([0.5]), torch.tensor([0.0]), allowed=0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_never_close_to_a_number(value):
    with pytest.raises(AssertionError, match="x: 1 of 1"):
        assert_close("x", torch.tensor([value]), torch.tensor([1.0]), atol=1e9, rtol=1e9)


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match=r"x: shape \(1,\), but expected \(1, 1\)"):
        assert_close("x", torch.zeros(1), torch.zeros(1, 1))


def test_fresh_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.zeros(2).new_empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3)).isnan().all()
