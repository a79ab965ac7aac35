"""Packed weights: the numbers that they stand for, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from grist_kernels.quantized import Fp8Weight, Int4Weight, Int8Weight, Mxfp4Weight, pack_nibbles


def int8(**changes) -> Int8Weight:
    parts = {"weight": torch.tensor([[-127, 5], [1, 0]], dtype=torch.int8), "scale": torch.tensor([0.5, 3.0])}
    return Int8Weight(**(parts | changes))


def int4(E: int = 2, O: int = 3, I: int = 64, group: int = 32, zeros: bool = True, **changes) -> Int4Weight:  # noqa: E741
    draw = torch.Generator().manual_seed(0)
    parts = {
        "packed": torch.randint(256, (E, O, I // 2), generator=draw).to(torch.uint8),
        "scale": torch.rand(E, O, I // group, generator=draw),
        "zero": torch.randint(16, (E, O, I // group), generator=draw).to(torch.uint8) if zeros else None,
    }
    return Int4Weight(**(parts | changes))


def test_int8_is_a_code_times_its_channels_scale():
    found = int8()
    assert found.shape == (2, 2)
    assert found.nbytes == 4 + 8
    assert found.dequantise().tolist() == [[-63.5, 2.5], [3.0, 0.0]]
    assert found.dequantise(torch.bfloat16).dtype == torch.bfloat16


def test_fp8_is_a_number_times_its_channels_scale():
    weight = torch.tensor([[448.0, -0.5], [2.0**-9, 1.0]]).to(torch.float8_e4m3fn)
    found = Fp8Weight(weight, torch.tensor([2.0, 4.0]))
    assert found.dequantise().tolist() == [[896.0, -1.0], [2.0**-7, 4.0]]
    assert (found.shape, found.nbytes) == ((2, 2), 12)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_has_the_even_element_in_the_low_four_bits(group, zeros):
    found = int4(I=256, group=group, zeros=zeros)
    assert (found.shape, found.group) == ((2, 3, 256), group)
    values = found.dequantise()
    for e, o, i in ((0, 0, 0), (0, 0, 1), (1, 2, 255), (1, 1, group), (0, 2, group - 1)):
        byte = int(found.packed[e, o, i // 2])
        code = byte >> 4 if i % 2 else byte & 15
        zero = 8 if found.zero is None else int(found.zero[e, o, i // group])
        assert values[e, o, i] == (code - zero) * found.scale[e, o, i // group]
    parts = 2 * 3 * (128 + 256 // group * (5 if zeros else 4))
    assert found.nbytes == parts
    assert found.bits_per_weight == 8 * parts / (2 * 3 * 256)
    assert torch.equal(pack_nibbles(found.codes()), found.packed)


def test_mxfp4_is_the_ops_own_reading():
    blocks = torch.full((1, 2, 1, 16), 0x7A, dtype=torch.uint8)  # low: -1, high: 6
    found = Mxfp4Weight(blocks, torch.tensor([[[127], [128]]], dtype=torch.uint8))
    assert (found.shape, found.nbytes) == ((1, 2, 32), 34)
    assert found.dequantise()[0, :, :3].tolist() == [[-1.0, 6.0, -1.0], [-2.0, 12.0, -2.0]]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: int8(weight=torch.zeros(2, 2)), r"Int8Weight\.weight must be torch\.int8, but is torch\.float32"),
        (lambda: int8(scale=torch.ones(2, 1)), r"Int8Weight\.scale must be \(2,\), but is \(2, 1\)"),
        (lambda: int8(scale=torch.ones(2).half()), r"Int8Weight\.scale must be torch\.float32"),
        (lambda: Int8Weight(torch.zeros(2, dtype=torch.int8), torch.ones(())), r"must be \(\.\.\., O, I\)"),
        (lambda: Fp8Weight(torch.zeros(2, 2), torch.ones(2)), r"Fp8Weight\.weight must be torch\.float8_e4m3fn"),
        (lambda: int4(scale=torch.ones(2, 3, 2).double()), "float32 or torch.bfloat16, but is torch.float64"),
        (lambda: int4(scale=torch.ones(2, 3, 4)), "4 scales for 64 inputs: a group must be 32, 64 or 128"),
        (lambda: int4(scale=torch.ones(2, 2, 2)), r"scale \(\.\.\., O, I / g\), but are \(2, 3, 32\) and \(2, 2, 2\)"),
        (lambda: int4(scale=torch.ones(2, 3, 0)), "scale"),
        (lambda: int4(zero=torch.ones(2, 3, 1, dtype=torch.uint8)), r"Int4Weight\.zero must be \(2, 3, 2\)"),
        (lambda: int4(zero=torch.ones(2, 3, 2)), r"Int4Weight\.zero must be torch\.uint8"),
        (
            lambda: Mxfp4Weight(torch.zeros(2, 1, 15, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8)),
            r"blocks must be \(\.\.\., O, I / 32, 16\)",
        ),
        (lambda: Mxfp4Weight(torch.zeros(2, 1, 16), torch.zeros(2, 1)), "must be torch.uint8"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(make, why):
    with pytest.raises(ValueError, match=why):
        make()
