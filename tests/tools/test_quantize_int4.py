"""int4 in groups: error bounds, the search for the clipping, and what is stored."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from grist_tools.quantize_int4 import quantise_int4

_numbers = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 1e-40, 1.0, -0.5, 1e-3])
weights = arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(64)), elements=_numbers).map(torch.from_numpy)
kinds = pytest.mark.parametrize("symmetric", [True, False])


def squared_error(packed, weight) -> torch.Tensor:
    difference = packed.dequantise().double() - weight.double()
    return difference.unflatten(-1, (-1, packed.group)).square().sum(-1)


@kinds
@given(weight=weights)
def test_without_search_a_value_is_off_by_at_most_half_a_scale(symmetric, weight):
    packed = quantise_int4(weight, 32, symmetric=symmetric, search=False)
    scale = packed.scale.double().repeat_interleave(32, -1)
    assert ((packed.dequantise().double() - weight.double()).abs() <= scale / 2 * (1 + 1e-6)).all()


@kinds
@given(weight=weights)
def test_the_search_never_makes_a_group_worse(symmetric, weight):
    plain = squared_error(quantise_int4(weight, 32, symmetric=symmetric, search=False), weight)
    searched = squared_error(quantise_int4(weight, 32, symmetric=symmetric), weight)
    assert (searched <= plain * (1 + 1e-5)).all()


@kinds
def test_the_search_makes_normal_weights_better(symmetric):
    weight = torch.randn(64, 256)
    plain = squared_error(quantise_int4(weight, 128, symmetric=symmetric, search=False), weight).sum()
    assert squared_error(quantise_int4(weight, 128, symmetric=symmetric), weight).sum() < 0.93 * plain


@kinds
@given(weight=weights)
def test_zero_stays_zero(symmetric, weight):
    weight[:, ::3] = 0
    assert (quantise_int4(weight, 32, symmetric=symmetric).dequantise()[:, ::3] == 0).all()


@kinds
@pytest.mark.parametrize("search", [True, False])
def test_what_was_dequantised_is_quantised_to_itself(symmetric, search):
    """Of normal weights; a group whose codes span less than 13 of 15 may find a finer grid."""
    values = quantise_int4(torch.randn(64, 256), 64, symmetric=symmetric, search=search).dequantise()
    assert torch.equal(quantise_int4(values, 64, symmetric=symmetric).dequantise(), values)


def test_a_lopsided_group_gains_from_a_zero_point():
    weight = torch.rand(8, 128) + 0.5
    one_sided = squared_error(quantise_int4(weight), weight).sum()
    assert squared_error(quantise_int4(weight, symmetric=False), weight).sum() < 0.5 * one_sided


@pytest.mark.parametrize("group", [32, 64, 128])
@kinds
def test_the_parts_have_their_shapes_and_types(symmetric, group):
    packed = quantise_int4(torch.randn(2, 5, 256), group, symmetric=symmetric)
    assert packed.shape == (2, 5, 256)
    assert packed.group == group
    assert packed.scale.dtype == torch.bfloat16
    assert (packed.zero is None) == symmetric
    as_float = quantise_int4(torch.randn(2, 256), group, symmetric=symmetric, scale_type=torch.float32)
    assert as_float.scale.dtype == torch.float32
    assert torch.equal(as_float.scale.bfloat16().float(), as_float.scale)


def test_bad_groups_types_and_values_are_refused():
    with pytest.raises(ValueError, match="must be 32, 64, 128 inputs, but is 16"):
        quantise_int4(torch.zeros(2, 64), 16)
    with pytest.raises(ValueError, match="groups of 128 do not divide 192 inputs: take 32 or 64"):
        quantise_int4(torch.zeros(2, 192), 128)
    with pytest.raises(ValueError, match="groups of 128 do not divide 40 inputs: int8 and fp8 have no groups"):
        quantise_int4(torch.zeros(2, 40), 128)
    with pytest.raises(ValueError, match=r"float32 or torch\.bfloat16, but is torch\.float16"):
        quantise_int4(torch.zeros(2, 128), scale_type=torch.float16)
    with pytest.raises(ValueError, match="int4: the weight has values that are not finite"):
        quantise_int4(torch.full((2, 128), math.nan))
