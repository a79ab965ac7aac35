"""MXFP4 weights mean what the format says, and experts that have them are experts.

T tokens, D model width, E experts, A active experts per token, F expert width.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from assertions import assert_close
from torch import Tensor

from grist_kernels import backend, moe, moe_mxfp4
from grist_kernels.moe.cases import GPT_OSS
from grist_kernels.moe_mxfp4 import pytorch_fast
from grist_kernels.moe_mxfp4.cases import quantised
from grist_kernels.moe_mxfp4.dequantise import dequantise_mxfp4

WEIGHTS = ("gate_up_blocks", "gate_up_scales", "down_blocks", "down_scales")


@pytest.fixture(params=["auto", "reference"])
def _each_implementation(request):
    with backend.using(request.param):
        yield


def inputs(T: int = 21, D: int = 64, E: int = 5, A: int = 2, F: int = 96, seed: int = 0) -> dict[str, Any]:
    """GPT-OSS's kind of call in float32."""
    generator = torch.Generator().manual_seed(seed)
    gate_up_blocks, gate_up_scales = quantised(generator, E, 2 * F, D, scale=D**-0.5)
    down_blocks, down_scales = quantised(generator, E, D, F, scale=F**-0.5)
    return {
        "x": torch.randn(T, D, generator=generator),
        "expert_ids": torch.rand(T, E, generator=generator).topk(A, -1).indices,
        "expert_weights": torch.rand(T, A, generator=generator),
        "gate_up_blocks": gate_up_blocks,
        "gate_up_scales": gate_up_scales,
        "down_blocks": down_blocks,
        "down_scales": down_scales,
        "b_gate_up": torch.randn(E, 2 * F, generator=generator),
        "b_down": torch.randn(E, D, generator=generator),
        **GPT_OSS,
    }


def dense(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call of `moe`: weights dequantised, in x's type, inputs first."""
    found = {name: value for name, value in arguments.items() if name not in WEIGHTS}
    for layer in ("gate_up", "down"):
        w = dequantise_mxfp4(arguments[f"{layer}_blocks"], arguments[f"{layer}_scales"])
        found[f"w_{layer}"] = w.transpose(1, 2).to(arguments["x"].dtype)
    return found


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


# The format.


def value(code: int, scale: int) -> float:
    """A value by the specification, as Python computes it: sign, two bits of exponent with bias 1, one bit of mantissa."""
    if scale == 255:
        return math.nan
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa * 0.5) * 2.0 ** (exponent - 1)
    exact = sign * math.ldexp(magnitude, scale - 127)
    return exact if abs(exact) < 2.0**128 else math.copysign(math.inf, exact)


def every_block() -> tuple[Tensor, Tensor]:
    """All bytes under all scales: blocks (256, 16, 16), scales (256, 16)."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16)
    return blocks, torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16)


def test_every_byte_under_every_scale():
    got = dequantise_mxfp4(*every_block())
    assert got.dtype == torch.float32
    bits = [
        struct.unpack("<I", struct.pack("<f", value(code, scale)))[0]
        for scale in range(255)
        for byte in range(256)
        for code in (byte & 15, byte >> 4)
    ]
    assert got[:255].contiguous().view(torch.int32).flatten().tolist() == torch.tensor(bits).int().tolist()
    assert got[255].isnan().all()


def test_scales_are_pytorch_s_e8m0():
    ones = torch.full((256, 1, 16), 0x22, dtype=torch.uint8)
    scales = torch.arange(256, dtype=torch.uint8)
    want = scales.view(torch.float8_e8m0fnu).float()
    assert torch.equal(dequantise_mxfp4(ones, scales[:, None])[:, 0][:255], want[:255])
    assert want[255].isnan()


def test_dequantised_as_transformers_does():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = quantised(torch.Generator().manual_seed(3), 3, 64, 96, scale=0.02)
    want = mxfp4.convert_moe_packed_tensors(blocks, scales)  # (E, in, out) bfloat16
    assert torch.equal(dequantise_mxfp4(blocks, scales).transpose(1, 2), want.float())


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        (torch.zeros(2, 3, 16), torch.zeros(2, 3).byte(), r"must be uint8, but are torch.float32 and torch.uint8"),
        (torch.zeros(2, 3, 8).byte(), torch.zeros(2, 3).byte(), r"but are \(2, 3, 8\) and \(2, 3\)"),
        (torch.zeros(2, 3, 16).byte(), torch.zeros(2, 4).byte(), r"but are \(2, 3, 16\) and \(2, 4\)"),
        (torch.zeros(3, 16).byte(), torch.zeros(3).byte(), r"but are \(3, 16\) and \(3,\)"),
    ],
)
def test_what_cannot_be_dequantised(blocks, scales, message):
    with pytest.raises(ValueError, match=message):
        dequantise_mxfp4(blocks, scales)


# The layer.


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("_each_implementation")
def test_equals_moe_with_dequantised_weights(dtype, interleaved):
    arguments = cast(inputs(), dtype) | {"interleaved": interleaved}
    want = moe(**dense(cast(arguments, torch.float64)))
    got = moe_mxfp4(**arguments)
    assert got.dtype == dtype
    few_roundings = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 4 * torch.finfo(dtype).eps)
    assert_close("out", got, want, atol=few_roundings * float(want.abs().max()))


@pytest.mark.usefixtures("_each_implementation")
def test_weights_of_experts_nobody_chose_may_be_anything():
    arguments = inputs()
    arguments["expert_ids"] = torch.tensor([0, 4, 2])[torch.arange(42).view(21, 2) % 3]
    want = moe_mxfp4(**arguments)
    for name in WEIGHTS:
        arguments[name][[1, 3]] = 255
    for name in ("b_gate_up", "b_down"):
        arguments[name][[1, 3]] = torch.nan
    assert torch.equal(moe_mxfp4(**arguments), want)


@pytest.mark.usefixtures("_each_implementation")
def test_a_scale_that_is_nan_reaches_the_tokens_of_its_expert():
    for name in ("gate_up_scales", "down_scales"):
        arguments = inputs()
        arguments[name][3, 7, 1] = 255
        chose = (arguments["expert_ids"] == 3).any(1)
        assert 0 < chose.sum() < 21
        assert moe_mxfp4(**arguments).isnan().any(1).tolist() == chose.tolist(), name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("_each_implementation")
def test_gradients_are_moe_s(compiled):
    names = ("x", "expert_weights", "b_gate_up", "b_down")
    arguments = inputs(T=9, D=32, E=3, F=32)
    d_out = torch.randn(9, 32)

    def gradients(function, given):
        leaves = {name: given[name].clone().requires_grad_() for name in names}
        return torch.autograd.grad(function(**(given | leaves)), list(leaves.values()), d_out)

    torch._dynamo.reset()
    door = torch.compile(moe_mxfp4, fullgraph=True, backend="aot_eager") if compiled else moe_mxfp4
    for name, got, want in zip(names, gradients(door, arguments), gradients(moe, dense(arguments)), strict=True):
        assert_close(f"d_{name}", got, want, atol=2e-6 * float(want.abs().max()))


def test_one_expert_is_dequantised_at_a_time(monkeypatch):
    shapes = []

    def noting(blocks: Tensor, scales: Tensor) -> Tensor:
        shapes.append(tuple(scales.shape))
        return dequantise_mxfp4(blocks, scales)

    monkeypatch.setattr(pytorch_fast, "dequantise_mxfp4", noting)
    arguments = inputs()
    arguments["expert_ids"] = torch.tensor([[4, 1]]).expand(21, 2)
    moe_mxfp4(**arguments)
    assert shapes == [(192, 2), (64, 3)] * 2


@pytest.mark.usefixtures("_each_implementation")
def test_no_tokens():
    arguments = inputs(T=0)
    assert moe_mxfp4(**arguments).shape == (0, 64)


@pytest.mark.parametrize("bad", [-1, 5])
@pytest.mark.usefixtures("_each_implementation")
def test_ids_out_of_range(bad):
    arguments = inputs()
    arguments["expert_ids"][3, 1] = bad
    with pytest.raises(
        ValueError, match=r"expert_ids must be in \[0, 5\), one of the weights' experts, but range from"
    ):
        moe_mxfp4(**arguments)
    torch._dynamo.reset()
    compiled = torch.compile(moe_mxfp4, fullgraph=True, backend="eager")
    if backend.mode() == "auto":  # the door may not look at values while it is traced; the operator does
        with pytest.raises(ValueError, match=r"must be in \[0, 5\)"):
            compiled(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_up_blocks": torch.zeros(5, 192, 2, 8).byte()}, r"gate_up_blocks must be \(E, 2F, D / 32, 16\)"),
        ({"gate_up_blocks": torch.zeros(5, 96, 2, 16).byte()}, "with F and D multiples of 32"),
        ({"gate_up_blocks": torch.zeros(5, 192, 2, 16)}, r"gate_up_blocks must be .* uint8 .* torch.float32"),
        ({"gate_up_scales": torch.zeros(5, 192, 3).byte()}, r"gate_up_scales must be \(5, 192, 2\) uint8"),
        ({"down_blocks": torch.zeros(5, 64, 2, 16).byte()}, r"down_blocks must be \(5, 64, 3, 16\) uint8"),
        ({"down_scales": torch.zeros(5, 64, 3)}, r"down_scales must be .* but is \(5, 64, 3\) torch.float32"),
        ({"x": torch.zeros(21, 32)}, r"x must be \(T, 64\) and floating point"),
        ({"x": torch.zeros(21, 64).int()}, "x must be .* but is .* torch.int32"),
        ({"expert_ids": torch.zeros(20, 2).long()}, r"must both be \(21, A\)"),
        ({"expert_ids": torch.zeros(21, 2)}, "expert_ids must be int32 or int64"),
        ({"b_gate_up": torch.zeros(5, 96)}, r"b_gate_up must be \(5, 192\) torch.float32"),
        ({"b_down": torch.zeros(5, 64).bfloat16()}, r"b_down must be .* torch.bfloat16"),
        ({"alpha": -1.0}, "moe_mxfp4: alpha must be positive"),
    ],
)
def test_what_does_not_fit_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        moe_mxfp4(**(inputs() | changes))
