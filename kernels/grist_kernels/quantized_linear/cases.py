"""Inputs of quantized_linear. M rows, O outputs, I inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grist_kernels.cases import Case, normal
from grist_kernels.moe_mxfp4.cases import quantised
from grist_kernels.quantized import Fp8Weight, Int4Weight, Int8Weight, Mxfp4Weight, PackedWeight

Make = Callable[[torch.Generator, int, int], PackedWeight]


def _codes(generator: torch.Generator, *shape: int, high: int = 256) -> Tensor:
    return torch.randint(high, shape, generator=generator, device=generator.device, dtype=torch.uint8)


def _scales(generator: torch.Generator, *shape: int, largest: float) -> Tensor:
    return (torch.rand(shape, generator=generator, device=generator.device) + 0.5) * largest


def int8(generator: torch.Generator, O: int, I: int) -> Int8Weight:  # noqa: E741 (the legend's letters)
    codes = _codes(generator, O, I).view(torch.int8)
    return Int8Weight(codes, _scales(generator, O, largest=I**-0.5 / 74))


def fp8(generator: torch.Generator, O: int, I: int) -> Fp8Weight:  # noqa: E741
    codes = _codes(generator, O, I)
    codes = torch.where((codes & 0x7F) == 0x7F, codes & 0x80, codes)  # all ones are NaN
    return Fp8Weight(codes.view(torch.float8_e4m3fn), _scales(generator, O, largest=I**-0.5 / 90))


def int4(group: int = 128, zeros: bool = False, scale_type: torch.dtype = torch.bfloat16) -> Make:
    def make(generator: torch.Generator, O: int, I: int) -> Int4Weight:  # noqa: E741
        scale = _scales(generator, O, I // group, largest=I**-0.5 / 4.6).to(scale_type)
        zero = _codes(generator, O, I // group, high=16) if zeros else None
        return Int4Weight(_codes(generator, O, I // 2), scale, zero)

    return make


def mxfp4(generator: torch.Generator, O: int, I: int) -> Mxfp4Weight:  # noqa: E741
    return Mxfp4Weight(*quantised(generator, O, I, scale=I**-0.5))


def _case(
    name: str,
    make: Make,
    *rows: int,
    O: int,  # noqa: E741
    I: int,  # noqa: E741
    bias: bool = False,
    gaps: bool = False,
    large: bool = False,
) -> Case:
    """gaps: x and the weight are not contiguous."""

    def build(generator):
        weight = make(generator, O, I)
        x = normal(generator, *rows, I + 32)[..., :I] if gaps else normal(generator, *rows, I)
        if gaps:
            weight = weight.mapped(lambda part: part.repeat_interleave(2, 0)[::2])
        return {"x": x, "weight": weight, "bias": normal(generator, O) if bias else None}

    return Case(name, build, large=large)


def at_size(size: int, rows: int) -> list[Case]:
    """Calls whose launches are those of tiles of so many rows: few rows in all for a recorder, who wants no large weights."""
    width = 4096 if rows >= 1024 else 512
    found = [
        _case(f"tile_{size}_{name}", make, size, O=width, I=width, bias=True)
        for name, make in (("int8", int8), ("fp8", fp8), ("int4", int4()), ("mxfp4", mxfp4))
    ]
    return [*found, _case(f"tile_{size}_int4_zeros", int4(32, True, torch.float32), size, O=width, I=width)]


_KINDS: dict[str, Make] = {
    "int8": int8,
    "fp8": fp8,
    "int4": int4(),
    "int4_zeros": int4(64, True),
    "int4_float32_scales": int4(32, True, torch.float32),
    "mxfp4": mxfp4,
}

CASES = [
    *(_case(f"{name}_one_row", make, 1, O=70, I=256, bias=True) for name, make in _KINDS.items()),
    *(_case(f"{name}_rows", make, 2, 3, O=33, I=384) for name, make in _KINDS.items()),
    *(_case(f"{name}_many_rows", make, 67, O=65, I=128, bias=True) for name, make in _KINDS.items()),
    _case("int8_prime", int8, 5, O=37, I=101, bias=True),
    _case("fp8_prime", fp8, 3, O=37, I=101),
    _case("int8_narrow", int8, 7, O=1, I=3),
    _case("int4_tail", int4(32), 9, O=40, I=160),
    _case("mxfp4_tail", mxfp4, 9, O=40, I=96),
    _case("int4_gaps", int4(32, True), 6, O=40, I=64, bias=True, gaps=True),
    _case("int8_gaps", int8, 21, O=40, I=64, gaps=True),
    _case("mxfp4_gaps", mxfp4, 21, O=40, I=64, gaps=True),
    *(_case(f"{name}_4096_one_row", make, 1, O=4096, I=4096, large=True) for name, make in _KINDS.items()),
    *(_case(f"{name}_4096_many_rows", make, 2048, O=4096, I=4096, large=True) for name, make in _KINDS.items()),
]
