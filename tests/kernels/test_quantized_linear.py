"""A linear layer with a packed weight is one with the numbers that the weight stands for. M rows, O outputs, I inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from assertions import assert_close

from grist_kernels import backend, native, quantized_linear
from grist_kernels.moe_mxfp4.dequantise import dequantise_mxfp4
from grist_kernels.native import linear as native_linear
from grist_kernels.native import moe as native_moe
from grist_kernels.quantized import Fp8Weight, Int4Weight, Int8Weight, Mxfp4Weight, PackedWeight
from grist_kernels.quantized_linear import cases, pytorch_fast

MAKERS = {
    "int8": cases.int8,
    "fp8": cases.fp8,
    "int4_32": cases.int4(32),
    "int4_64_zeros": cases.int4(64, True),
    "int4_128": cases.int4(128, False, torch.float32),
    "int4_128_zeros": cases.int4(128, True, torch.float32),
    "mxfp4": cases.mxfp4,
}


def weight_of(name: str, O: int = 67, I: int = 256, seed: int = 0) -> PackedWeight:  # noqa: E741 (the legend's letters)
    return MAKERS[name](torch.Generator().manual_seed(seed), O, I)


@pytest.fixture
def _native():
    if not native.available():
        pytest.skip("there is no C compiler")


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.usefixtures("_native")
def test_native_products_are_those_of_the_numbers(name, bias, rows):
    weight, x = weight_of(name), torch.randn(rows, 256)
    b = torch.randn(67) if bias else None
    want = x.double() @ weight.dequantise(torch.float64).T + (0 if b is None else b.double())
    with torch.no_grad():
        got = native_linear.linear(x, weight, b)
    assert_close(name, got, want, atol=2e-6 * float(want.abs().max()))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("_native")
def test_native_products_do_not_depend_on_threads(threads):
    weight, x = weight_of("int4_32", O=1030), torch.randn(2, 256)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = native_linear.linear(x, weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got[:, :100], native_linear.linear(x, weight.mapped(lambda part: part[:100])))


def test_every_code_under_every_scale():
    """One input each, so that the products are the numbers themselves."""
    with torch.no_grad():
        bytes_ = torch.arange(256, dtype=torch.uint8)
        for row in (bytes_.view(torch.int8), bytes_.view(torch.float8_e4m3fn)):
            kind = Int8Weight if row.dtype == torch.int8 else Fp8Weight
            weight = kind(row[:, None].contiguous(), torch.full((256,), 0.25))
            got = quantized_linear(torch.full((1, 1), 3.0), weight)[0]
            assert torch.equal(got.nan_to_num(7e9), (0.75 * row.float()).nan_to_num(7e9))
        eye = torch.eye(32)
        packed = bytes_.view(16, 16)
        for zero in (None, torch.arange(16, dtype=torch.uint8)[:, None]):
            weight = Int4Weight(packed, torch.linspace(0.1, 2, 16)[:, None], zero)
            got = torch.cat([quantized_linear(part, weight) for part in eye.split(8)])
            assert_close("int4", got.T, weight.dequantise(), atol=1e-6)
        scales = torch.arange(100, 116, dtype=torch.uint8)[:, None]
        got = torch.cat([quantized_linear(part, Mxfp4Weight(packed[:, None], scales)) for part in eye.split(8)])
        assert torch.equal(got.T, dequantise_mxfp4(packed[:, None], scales))


def test_mxfp4_s_smallest_and_missing_scales():
    packed = torch.full((3, 1, 16), 0x22, dtype=torch.uint8)
    weight = Mxfp4Weight(packed, torch.tensor([[0], [254], [255]], dtype=torch.uint8))
    with torch.no_grad():
        got = quantized_linear(torch.eye(32)[:1], weight)[0]
    assert got[:2].tolist() == [2.0**-127, 2.0**127]
    assert got[2].isnan()


@pytest.mark.parametrize("name", ["int8", "int4_32", "int4_64_zeros", "mxfp4"])
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_gradients_reach_activations_and_bias(name, mode):
    weight = weight_of(name)
    x, bias = torch.randn(5, 256, requires_grad=True), torch.randn(67, requires_grad=True)
    with backend.using(mode):
        quantized_linear(x, weight, bias).sum().backward()
    assert x.grad is not None
    assert_close("d_x", x.grad, weight.dequantise().sum(0).expand(5, -1), atol=1e-4)
    assert bias.grad is not None
    assert bias.grad.tolist() == [5.0] * 67


def test_blocks_of_a_weight_make_the_whole(monkeypatch):
    weight, x, bias = weight_of("int8"), torch.randn(100, 256), torch.randn(67)
    monkeypatch.setattr(pytorch_fast, "_AT_ONCE", 10 * 256)
    with native.using("0"):
        got = quantized_linear(x, weight, bias)
    assert_close("out", got, x @ weight.dequantise().T + bias, atol=1e-5)


def test_no_rows():
    assert quantized_linear(torch.zeros(0, 256), weight_of("int8")).shape == (0, 67)


@pytest.mark.parametrize("name", ["int8", "fp8", "int4_32", "int4_64_zeros", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("_native")
def test_native_experts(name, dtype):
    """Tokens that share an expert, one that names it twice, biases, and widths that are no multiples of 64."""
    T, D, E, F = 6, 192, 5, 128
    generator = torch.Generator().manual_seed(0)
    each = [(MAKERS[name](generator, 2 * F, D), MAKERS[name](generator, D, F)) for _ in range(E)]
    gate_up, down = (_stacked([pair[i] for pair in each]) for i in (0, 1))
    ids = torch.tensor([[0, 1], [1, 1], [4, 1], [1, 0], [2, 1], [1, 4]])
    x, weights = torch.randn(T, D).to(dtype), torch.rand(T, 2)
    biases = torch.randn(E, 2 * F).to(dtype), torch.randn(E, D).to(dtype)
    options = {"alpha": 1.702, "limit": 7.0, "interleaved": False}
    with torch.no_grad():
        assert native_moe.fits_packed(x, ids, gate_up, down)
        got = native_moe.moe(x, ids, weights, gate_up, down, *biases, **options)
    from grist_kernels.moe.reference import moe

    wide = [w.dequantise(torch.float64).transpose(1, 2) for w in (gate_up, down)]
    want = moe(x.double(), ids, weights.double(), *wide, *(b.double() for b in biases), **options)
    assert_close(name, got, want, atol=(3e-6 if dtype == torch.float32 else 1e-2) * float(want.abs().max()))


def _stacked(weights: list[PackedWeight]) -> PackedWeight:
    return replace(
        weights[0], **{name: torch.stack([each.tensors[name] for each in weights]) for name in weights[0].tensors}
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 256), torch.zeros(67, 256)), "must be an Int8Weight.* but is Tensor"),
        ((torch.zeros(1, 255), weight_of("int8")), r"x must be \(..., 256\) and floating point"),
        ((torch.zeros(1, 256).int(), weight_of("int8")), "but is .* torch.int32"),
        ((torch.zeros(1, 256), weight_of("int8"), torch.zeros(66)), r"bias must be \(67,\) torch.float32"),
        ((torch.zeros(1, 256), weight_of("int8"), torch.zeros(67).bfloat16()), "torch.bfloat16"),
        ((torch.zeros(1, 256), weight_of("int8").mapped(lambda p: p[None])), r"must be \(O, I\).*index experts first"),
        ((torch.zeros(1, 256, device="meta"), weight_of("int8")), "weight.weight is on cpu, but x is on meta"),
    ],
)
def test_what_does_not_fit_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantized_linear(*arguments)
