"""What a CPU runs for a few tokens computes what the ops do, and sees weights that change."""

from __future__ import annotations

import pytest
import torch
from generation_steps import KINDS, check_changed_weights, check_steps
from native_setting import without_native  # noqa: F401

import grist_kernels
from grist_model import few_rows


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("width", [1, 7, 64, 2880])
def test_norm_is_that_of_float64(width):
    x, weight = 3 * torch.randn(2, 4, width), torch.randn(width)
    exact = grist_kernels.rms_norm(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(few_rows.rms_norm(x, weight, 1e-5).double(), exact, rtol=1e-5, atol=1e-6)
    assert few_rows.rms_norm(torch.zeros(1, width), weight, 1e-5).count_nonzero() == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_rotation_is_that_of_the_op(rows):
    q, k = torch.randn(rows, 2, 4, 6), torch.randn(rows, 2, 2, 6)
    angle = 10 * torch.rand(rows, 2, 3)
    expected = grist_kernels.rope(q, k, angle.cos(), angle.sin())
    got = few_rows.rope(q, k, *few_rows.whole_heads(angle.cos(), angle.sin()))
    for new, old in zip(got, expected, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_a_wide_model_are_those_of_the_reference(no_gradients, kind):
    check_steps(kind)


@pytest.mark.usefixtures("without_native")
def test_weights_may_change_between_two_steps(no_gradients):
    check_changed_weights()
