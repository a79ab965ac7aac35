"""Weights in fewer bits: int8 and fp8 with a scale an output channel, and MXFP4. int4 is in quantize_int4.py and gptq.py.

Each scheme is a pair: `quantise_X(weight)` here, and `.dequantise()` of what it returns (grist_kernels.quantized). Weights are
out-major, (..., O, I). Scales are numbers that bfloat16 holds, since readers keep them in the type of the model; rounded to
the nearest one they still leave 127 (448) the largest code, so that quantising a dequantised weight changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels.moe_mxfp4.dequantise import BLOCK
from grist_kernels.quantized import Fp8Weight, Int8Weight, Mxfp4Weight, pack_nibbles

INT8_LARGEST = 127
FP8_LARGEST = 448.0  # of E4M3 without infinities (Micikevicius et al., "FP8 Formats for Deep Learning", 2022)
SMALLEST_SCALE = 2.0**-126  # below, the bits of bfloat16 run out

# Half-way between the magnitudes of E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6). A tie goes to the even code: up from an odd one.
_BETWEEN_E2M1 = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_E2M1_EXPONENT = 2  # of its largest number, 6
_E8M0_BIAS = 127


def quantise_int8(weight: Tensor) -> Int8Weight:
    """(..., O, I) -> codes from -127 to 127; off by at most half a scale.

    Raises ValueError for values that are not finite.
    """
    values = finite(weight, "int8")
    scale = nearest_bfloat16(values.abs().amax(-1) / INT8_LARGEST)
    codes = (values / scale.unsqueeze(-1)).round().clamp(-INT8_LARGEST, INT8_LARGEST)
    return Int8Weight(codes.to(torch.int8), scale)


def quantise_fp8(weight: Tensor) -> Fp8Weight:
    """(..., O, I) -> E4M3, rounded to the nearest: off by at most a sixteenth of a value, or 2**-10 of its scale.

    Raises ValueError for values that are not finite.
    """
    values = finite(weight, "fp8")
    scale = nearest_bfloat16(values.abs().amax(-1) / FP8_LARGEST)
    codes = (values / scale.unsqueeze(-1)).clamp(-FP8_LARGEST, FP8_LARGEST)
    return Fp8Weight(codes.to(torch.float8_e4m3fn), scale)


def quantise_mxfp4(weight: Tensor) -> Mxfp4Weight:
    """(..., O, I) -> blocks of 32 inputs: OCP Microscaling Formats (MX) Specification v1.0, 2023, section 6.3.

    The scale is the power of two below a block's largest magnitude, divided by the one below E2M1's (4); numbers are rounded to
    the nearest, ties to the even code, and what is above 6 becomes 6.

    Raises ValueError for values that are not finite, and for I that is no multiple of 32.
    """
    if weight.shape[-1] % BLOCK:
        raise ValueError(
            f"MXFP4 has blocks of {BLOCK} inputs, but the weight has {weight.shape[-1]}: {BLOCK} must divide it"
        )
    values = finite(weight, "MXFP4").unflatten(-1, (-1, BLOCK))
    # frexp gives a mantissa in [0.5, 1): the exponent of the power of two below is one less. Of zero it gives 0.
    largest = values.abs().amax(-1)
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 1, -_E8M0_BIAS) - _E2M1_EXPONENT
    exponent = exponent.clamp(-_E8M0_BIAS, _E8M0_BIAS)
    scaled = torch.ldexp(values, -exponent.unsqueeze(-1))
    scales = (exponent + _E8M0_BIAS).to(torch.uint8)
    return Mxfp4Weight(pack_nibbles(_e2m1_codes(scaled)), scales)


def _e2m1_codes(values: Tensor) -> Tensor:
    magnitudes = values.abs()
    codes = torch.signbit(values).to(torch.uint8) << 3
    for below, between in enumerate(_BETWEEN_E2M1):
        codes += (magnitudes >= between) if below % 2 else (magnitudes > between)
    return codes


def finite(weight: Tensor, scheme: str) -> Tensor:
    """The weight in float32. Raises ValueError where it has values that no scheme has a code for."""
    values = weight.float()
    if not values.isfinite().all():
        raise ValueError(f"{scheme}: the weight has values that are not finite (NaN or infinite)")
    return values


def nearest_bfloat16(scale: Tensor) -> Tensor:
    """float32 scales that bfloat16 holds. None is zero, or so small that the quotient overflows."""
    return scale.clamp_min(SMALLEST_SCALE).bfloat16().float()
