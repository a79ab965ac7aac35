"""GPTQ against elimination done naively, and against rounding to nearest on activations like those it was calibrated on."""

from __future__ import annotations

import math

import pytest
import torch

from grist_tools.gptq import DAMPING, Hessian, quantise_int4_gptq
from grist_tools.quantize_int4 import grid_of, quantise_int4


def activations(inputs: int, rows: int = 1000, seed: int = 0) -> torch.Tensor:
    """Correlated, as those of a model are: half as many directions as inputs carry most of them."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs // 2, inputs, generator=torch.Generator().manual_seed(99))
    x = torch.randn(rows, inputs // 2, generator=draw) @ mixing
    return x + 0.3 * torch.randn(rows, inputs, generator=draw)


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    found = Hessian(x.shape[-1])
    for part in x.split(300):
        found.add(part[None])
    return found.sum_II


def output_error(weight, packed, x) -> float:
    return ((weight - packed.dequantise()) @ x.T).square().mean().item()


def naive(weight: torch.Tensor, hessian: torch.Tensor, group: int, symmetric: bool) -> torch.Tensor:
    """Optimal brain surgery column by column (equations 2 and 3 of the paper), the inverse shrunk by Gaussian elimination."""
    w, I = weight.double().clone(), weight.shape[1]  # noqa: E741 (inputs)
    h = hessian.double()
    inverse = torch.linalg.inv(h + DAMPING * h.diagonal().mean() * torch.eye(I, dtype=torch.double))
    found = torch.zeros_like(w)
    grid = None
    for column in range(I):
        if column % group == 0:
            part = w[:, column : column + group].float().unsqueeze(-2)
            grid = grid_of(part, symmetric=symmetric, search=True)
        assert grid is not None
        found[:, column] = grid.values(grid.codes(w[:, column, None, None].float()))[:, 0, 0].double()
        error = (w[:, column] - found[:, column]) / inverse[column, column]
        w -= error[:, None] * inverse[column]
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inputs", "group"), [(64, 32), (192, 64), (256, 128)])
def test_it_is_elimination_column_by_column(inputs, group, symmetric):
    weight, hessian = torch.randn(16, inputs), hessian_of(activations(inputs))
    found = quantise_int4_gptq(weight, hessian, group, symmetric=symmetric, scale_type=torch.float32).dequantise()
    expected = naive(weight, hessian, group, symmetric)
    # float32 against float64: a value near a tie may go the other way, and then moves those after it.
    assert (found - expected).abs().lt(1e-5).double().mean() > 0.97


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_are_nearer_than_by_rounding(symmetric, activation_order):
    weight, hessian = torch.randn(64, 256), hessian_of(activations(256))
    calibrated = quantise_int4_gptq(weight, hessian, symmetric=symmetric, activation_order=activation_order)
    fresh = activations(256, seed=1)
    assert output_error(weight, calibrated, fresh) < 0.6 * output_error(
        weight, quantise_int4(weight, symmetric=symmetric), fresh
    )


@pytest.mark.parametrize("activation_order", [False, True])
def test_without_correlations_it_rounds_to_nearest(activation_order):
    weight = torch.randn(16, 128)
    found = quantise_int4_gptq(weight, torch.eye(128), 64, activation_order=activation_order)
    expected = quantise_int4(weight, 64)
    assert torch.equal(found.packed, expected.packed)
    assert torch.equal(found.scale, expected.scale)


def test_inputs_that_are_always_zero_do_no_harm():
    x = activations(128)
    x[:, 5:40] = 0
    weight = torch.randn(16, 128)
    found = quantise_int4_gptq(weight, hessian_of(x), 32)
    assert output_error(weight, found, x) < output_error(weight, quantise_int4(weight, 32), x)
    unseen = quantise_int4_gptq(weight, torch.zeros(128, 128), 32)  # an expert that no token chose
    assert torch.equal(unseen.packed, quantise_int4(weight, 32).packed)


def test_a_hessian_is_the_sum_over_rows():
    x = torch.randn(7, 3)
    found = Hessian(3)
    found.add(x[:2])
    found.add(x[2:].view(1, 5, 3))
    assert torch.allclose(found.sum_II, x.T @ x, atol=1e-5)


def test_bad_input_is_refused():
    weight = torch.randn(4, 128)
    with pytest.raises(ValueError, match=r"must be \(128, 128\), but is \(64, 64\)"):
        quantise_int4_gptq(weight, torch.eye(64))
    with pytest.raises(ValueError, match="activations have values that are not finite"):
        quantise_int4_gptq(weight, torch.full((128, 128), math.inf))
    with pytest.raises(ValueError, match="weight has values that are not finite"):
        quantise_int4_gptq(weight / 0, torch.eye(128))
    with pytest.raises(ValueError, match="must be 32, 64, 128 inputs, but is 48"):
        quantise_int4_gptq(weight, torch.eye(128), 48)
