"""Products of a few rows and a packed weight (packed.c). R rows, O outputs, I inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from grist_kernels import native

if TYPE_CHECKING:
    from grist_kernels.quantized import PackedWeight

CODES = {"int8": 2, "fp8": 3, "int4": 4, "mxfp4": 5}  # `enum Kind` of weights.h
_POWER_OF_TWO = 2


def weight_fields(weight: PackedWeight) -> tuple[int, ...]:
    """The fields of `Weight` in weights.h."""
    codes, scales = weight.codes_and_scales
    inputs, zeros = weight.shape[-1], getattr(weight, "zero", None)
    return (
        codes.data_ptr(),
        CODES[weight.kind],
        inputs,
        scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        native.KINDS.get(scales.dtype, _POWER_OF_TWO),
        inputs // (scales.shape[-1] if weight.kind in ("int4", "mxfp4") else 1),
    )


def holds(weight: PackedWeight) -> bool:
    """Whether the library can read it: plain tensors without gaps, on a CPU."""
    parts = weight.tensors.values()
    return all(type(part) is Tensor and part.is_contiguous() and part.device.type == "cpu" for part in parts)
