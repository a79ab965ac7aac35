"""int8, fp8 and MXFP4: error bounds, requantising, and MXFP4's bytes against a slow encoder and torchao."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from grist_kernels.quantized import Mxfp4Weight
from grist_tools.quantize import quantise_fp8, quantise_int8, quantise_mxfp4

QUANTISERS = {"int8": quantise_int8, "fp8": quantise_fp8, "mxfp4": quantise_mxfp4}
_numbers = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 1e-40, 1.0, -0.5, 1e-3])
weights = arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(32)), elements=_numbers).map(torch.from_numpy)


@given(weights)
def test_int8_is_off_by_at_most_half_a_scale(weight):
    packed = quantise_int8(weight)
    assert packed.weight.abs().max() <= 127
    error = (packed.dequantise().double() - weight.double()).abs()
    assert (error <= packed.scale.double().unsqueeze(-1) / 2 * (1 + 1e-6)).all()


@given(weights)
def test_fp8_is_off_by_at_most_half_the_distance_to_its_neighbours(weight):
    packed = quantise_fp8(weight)
    scale = packed.scale.double().unsqueeze(-1)
    error = (packed.dequantise().double() - weight.double()).abs()
    # Three bits of mantissa: half a step is 2**-4 of a value, and 2**-10 below the smallest normal number.
    assert (error <= torch.maximum(weight.double().abs() / 16, scale * 2**-10) * (1 + 1e-6)).all()


@given(weights)
def test_mxfp4_is_off_by_at_most_half_the_distance_to_its_neighbours(weight):
    packed = quantise_mxfp4(weight)
    scale = torch.exp2(packed.scales.double() - 127)
    y = weight.double().abs() / scale
    half_step = torch.where(y < 2, 0.25, torch.where(y < 4, 0.5, torch.where(y <= 6, 1.0, y - 6)))
    error = (packed.dequantise().double() - weight.double()).abs() / scale
    assert (error <= half_step).all()


@pytest.mark.parametrize("name", QUANTISERS)
@given(weight=weights)
def test_what_was_dequantised_is_quantised_to_itself(name, weight):
    values = QUANTISERS[name](weight).dequantise()
    assert torch.equal(QUANTISERS[name](values).dequantise(), values)


@given(weights)
def test_scales_are_numbers_that_bfloat16_holds(weight):
    for quantise in (quantise_int8, quantise_fp8):
        scale = quantise(weight).scale
        assert torch.equal(scale.bfloat16().float(), scale)
        assert (scale > 0).all()


@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(name, value):
    weight = torch.zeros(2, 32)
    weight[1, 7] = value
    with pytest.raises(ValueError, match="not finite"):
        QUANTISERS[name](weight)


def test_experts_have_scales_of_their_own():
    weight = torch.randn(3, 4, 64) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    for name, quantise in QUANTISERS.items():
        packed = quantise(weight)
        assert packed.shape == weight.shape
        alone = quantise(weight[1])
        assert torch.equal(packed.dequantise()[1], alone.dequantise()), name


# MXFP4

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def slow_block(block: list[float]) -> tuple[int, list[int]]:
    """The specification's words with Python's numbers: a scale byte, and 32 codes."""
    largest = max(abs(x) for x in block)
    exponent = -127 if largest == 0 else max(-127, min(127, math.floor(math.log2(largest)) - 2))
    codes = []
    for x in block:
        y = abs(x) / 2.0**exponent
        # The nearest; of two equally near ones, the one whose code is even.
        code = min(range(8), key=lambda c: (abs(E2M1[c] - y), c % 2))
        codes.append(code | (8 if math.copysign(1.0, x) < 0 else 0))
    return exponent + 127, codes


def codes_of(packed: Mxfp4Weight) -> list[int]:
    return torch.stack((packed.blocks & 15, packed.blocks >> 4), -1).flatten().tolist()


def awkward_blocks() -> torch.Tensor:
    """Every value of E2M1 and every tie, on both sides of each, with both signs, at every scale; zeros; the ends of float32."""
    ties = [(a + b) / 2 for a, b in itertools.pairwise(E2M1)]
    near = [float(np.nextafter(np.float32(t), np.float32(s))) for t in ties for s in (0, 9)]
    values = [*E2M1, *ties, *near, 6.5, 7.0, 7.9999995]
    rows = []
    for exponent in (*range(-149, 126, 11), -127, -126, -125, 0, 1, 125):
        for low in range(0, len(values), 15):
            part = [math.ldexp(v, exponent) for v in values[low : low + 15]]
            row = [*part, *(-v for v in part), math.ldexp(4.0, exponent), -0.0]
            rows.append(row + [0.0] * (32 - len(row)))
    rows += [[0.0] * 32, [-0.0] * 32, [3.4028234663852886e38] + [1.0] * 31, [1.4e-45] * 32, [2.0**-127] * 32]
    return torch.tensor(rows, dtype=torch.float64).float()


def test_mxfp4_is_the_specifications_encoding_bit_for_bit():
    blocks = awkward_blocks()
    packed = quantise_mxfp4(blocks)
    expected = [slow_block(row) for row in blocks.double().tolist()]
    assert packed.scales.flatten().tolist() == [scale for scale, _ in expected]
    assert codes_of(packed) == [code for _, codes in expected for code in codes]


def test_every_pattern_of_a_block_is_its_own_encoding():
    """Each code at each place under each scale; a block needs a 4 or a 6 to have the scale that it has."""
    codes = torch.arange(16 * 32).view(16, 32) % 16
    codes = torch.stack([codes.roll(k, 1) for k in range(16)]).flatten(0, 1).to(torch.uint8)
    blocks = (codes[:, 0::2] | codes[:, 1::2] << 4)[None].expand(253, -1, -1).unsqueeze(-2)
    scales = torch.arange(253, dtype=torch.uint8)[:, None, None].expand(-1, codes.shape[0], 1)
    again = quantise_mxfp4(Mxfp4Weight(blocks.contiguous(), scales.contiguous()).dequantise())
    assert torch.equal(again.scales, scales)
    assert torch.equal(again.blocks, blocks)


def test_mxfp4_is_torchaos_bit_for_bit():
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    weight = torch.cat([awkward_blocks(), torch.randn(500, 32) * torch.exp(4 * torch.randn(500, 1))])
    scales, data = mx.to_mx(weight, torch.float4_e2m1fn_x2, 32)
    packed = quantise_mxfp4(weight)
    assert torch.equal(packed.scales, scales.view(torch.uint8).view(packed.scales.shape))
    # Under the smallest scale, 2**-127, which float32 has as a subnormal only, torchao divides by 2**-126.
    compared = packed.scales.flatten() > 0
    assert compared.sum() > 500
    assert torch.equal(packed.blocks.flatten(1)[compared], data.view(torch.uint8)[compared])


def test_mxfp4_wants_blocks_of_32():
    with pytest.raises(ValueError, match="blocks of 32 inputs, but the weight has 48"):
        quantise_mxfp4(torch.zeros(2, 48))
