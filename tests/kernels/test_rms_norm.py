"""What is true of every RMSNorm."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_close

from grist_kernels import rms_norm


@pytest.mark.parametrize("width", [1, 7, 60, 2880])
def test_rows_have_unit_root_mean_square(width):
    y = rms_norm(torch.randn(5, width) * 3, torch.ones(width), eps=0.0)
    assert_close("root mean square", y.square().mean(-1).sqrt(), torch.ones(5), atol=1e-5)


def test_scaling_the_input_changes_nothing():
    x, weight = torch.randn(5, 60), torch.randn(60)
    assert_close("y", rms_norm(8 * x, weight, eps=0.0), rms_norm(x, weight, eps=0.0), atol=1e-5)


def test_gradient_is_orthogonal_to_the_input():
    """The other side of scale invariance: moving along x does nothing."""
    x = torch.randn(5, 60, dtype=torch.float64, requires_grad=True)
    (
        rms_norm(x, torch.randn(60, dtype=torch.float64), eps=0.0) * torch.randn(5, 60, dtype=torch.float64)
    ).sum().backward()
    assert x.grad is not None
    assert_close("x . dx", (x * x.grad).sum(-1), torch.zeros(5), atol=1e-12)


def test_zero_row_stays_zero():
    y = rms_norm(torch.zeros(2, 8), torch.ones(8))
    assert_close("y", y, torch.zeros(2, 8))


def test_residual_is_the_sum_and_y_its_norm():
    x, residual, weight = torch.randn(5, 60), torch.randn(5, 60), torch.randn(60)
    y, new_residual = rms_norm(x, weight, residual=residual)
    assert torch.equal(new_residual, x + residual)
    assert torch.equal(y, rms_norm(new_residual, weight))


def test_residual_passes_its_own_gradient_through():
    x = torch.randn(5, 60, dtype=torch.float64, requires_grad=True)
    _, new_residual = rms_norm(x, torch.ones(60, dtype=torch.float64), residual=torch.randn(5, 60, dtype=torch.float64))
    new_residual.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(5, 60, dtype=torch.float64))


@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck(residual):
    x, r = (torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, 1e-5, r if residual else None), (x, weight, r))


def test_no_rows():
    x = torch.randn(0, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    rms_norm(x, weight).sum().backward()
    assert weight.grad is not None
    assert_close("d_weight", weight.grad, torch.zeros(8))


def test_weight_may_be_wider_than_x():
    y = rms_norm(torch.randn(5, 60, dtype=torch.bfloat16), torch.randn(60))
    assert y.dtype == torch.bfloat16


def test_bad_shapes_are_named():
    with pytest.raises(
        ValueError, match=r"weight must be \(60,\) to match x, but x is \(5, 60\) and weight is \(59,\)"
    ):
        rms_norm(torch.randn(5, 60), torch.ones(59))
    with pytest.raises(ValueError, match="residual must have x's shape and type"):
        rms_norm(torch.randn(5, 60), torch.ones(60), residual=torch.randn(4, 60))
    with pytest.raises(ValueError, match="x must be floating point, but is"):
        rms_norm(torch.ones(5, 60, dtype=torch.int64), torch.ones(60))


def test_offset_is_added_to_the_weight():
    x, weight = torch.randn(5, 60), torch.randn(60)
    assert_close("y", rms_norm(x, weight, offset=1.0), rms_norm(x, weight + 1), atol=1e-6)


def test_heads_are_rows():
    x, weight = torch.randn(2, 7, 6, 64), torch.randn(64)
    heads = x[:, :, 1:4]
    together = rms_norm(heads, weight)
    for n in range(3):
        assert_close(f"head {n}", together[:, :, n], rms_norm(heads[:, :, n].contiguous(), weight), atol=1e-6)
