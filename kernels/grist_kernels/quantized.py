"""Packed weights: what is stored of a matrix in few bits, and the numbers that it stands for.

All are out-major: a weight of the logical shape (..., O, I) gives y = x @ weight.T, O outputs, I inputs, with a leading E for
experts. The scales lie along the inputs (g values share one) or are one an output channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from grist_kernels.moe_mxfp4.dequantise import BLOCK, dequantise_mxfp4

INT4_GROUPS = (32, 64, 128)
INT4_MIDDLE = 8  # the code of zero in a symmetric weight
SCALE_TYPES = (torch.float32, torch.bfloat16)


class _Packed:
    """What the four have in common: they are tensors side by side."""

    kind: ClassVar[str]
    shape: torch.Size

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parts by name; a part that is None is left out."""
        parts = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        return {name: part for name, part in parts.items() if part is not None}

    def mapped(self, function: Callable[[Tensor], Tensor]) -> PackedWeight:
        """The same weight with function(part) for each part: moved, indexed by expert, made contiguous."""
        return type(self)(**{name: function(part) for name, part in self.tensors.items()})  # type: ignore[return-value]

    @property
    def codes_and_scales(self) -> tuple[Tensor, Tensor]:
        """The first two parts, whatever they are called."""
        codes, scales, *_ = (getattr(self, each.name) for each in fields(self))  # type: ignore[arg-type]
        return codes, scales

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.shape.numel()


@dataclass(frozen=True, eq=False)
class Int8Weight(_Packed):
    """weight (..., O, I) int8, scale (..., O) float32: symmetric, a scale an output channel."""

    kind: ClassVar[str] = "int8"
    weight: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        _require_type("Int8Weight.weight", self.weight, torch.int8)
        _check_channels("Int8Weight", self.weight, self.scale)

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.weight.float() * self.scale.unsqueeze(-1)).to(dtype)


@dataclass(frozen=True, eq=False)
class Fp8Weight(_Packed):
    """weight (..., O, I) float8_e4m3fn, scale (..., O) float32: a scale an output channel."""

    kind: ClassVar[str] = "fp8"
    weight: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        _require_type("Fp8Weight.weight", self.weight, torch.float8_e4m3fn)
        _check_channels("Fp8Weight", self.weight, self.scale)

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.weight.float() * self.scale.unsqueeze(-1)).to(dtype)


@dataclass(frozen=True, eq=False)
class Int4Weight(_Packed):
    """Groups of g = 32, 64 or 128 inputs: value = (code - zero) * scale, with codes from 0 to 15.

    packed (..., O, I / 2) uint8, element 2j in the low four bits of byte j and 2j + 1 in the high ones; scale (..., O, I / g)
    float32 or bfloat16; zero (..., O, I / g) uint8, or None for 8 everywhere (symmetric). Read as little-endian int32, packed
    is compressed-tensors' weight_packed.
    """

    kind: ClassVar[str] = "int4"
    packed: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def __post_init__(self) -> None:
        _require_type("Int4Weight.packed", self.packed, torch.uint8)
        _require_type("Int4Weight.scale", self.scale, *SCALE_TYPES)
        packed, scale = tuple(self.packed.shape), tuple(self.scale.shape)
        if len(packed) < 2 or len(scale) != len(packed) or scale[:-1] != packed[:-1] or not scale[-1]:
            raise ValueError(
                f"Int4Weight: packed must be (..., O, I / 2) and scale (..., O, I / g), but are {packed} and {scale}"
            )
        if 2 * packed[-1] not in [group * scale[-1] for group in INT4_GROUPS]:
            raise ValueError(
                f"Int4Weight: {scale[-1]} scales for {2 * packed[-1]} inputs: a group must be 32, 64 or 128 inputs wide"
            )
        if self.zero is not None:
            _require_type("Int4Weight.zero", self.zero, torch.uint8)
            _require_shape("Int4Weight.zero", self.zero, scale)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.packed.shape[:-1], 2 * self.packed.shape[-1]))

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[-1] // self.scale.shape[-1]

    def codes(self) -> Tensor:
        """(..., O, I) uint8, each from 0 to 15."""
        return torch.stack((self.packed & 15, self.packed >> 4), -1).flatten(-2)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        zero = INT4_MIDDLE if self.zero is None else self.zero.float().unsqueeze(-1)
        groups = self.codes().float().unflatten(-1, (-1, self.group))
        return ((groups - zero) * self.scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


@dataclass(frozen=True, eq=False)
class Mxfp4Weight(_Packed):
    """blocks (..., O, I / 32, 16) uint8, scales (..., O, I / 32) uint8; see moe_mxfp4/dequantise.py for the numbers."""

    kind: ClassVar[str] = "mxfp4"
    blocks: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        _require_type("Mxfp4Weight.blocks", self.blocks, torch.uint8)
        _require_type("Mxfp4Weight.scales", self.scales, torch.uint8)
        blocks, scales = tuple(self.blocks.shape), tuple(self.scales.shape)
        if len(blocks) < 3 or blocks[-1] != BLOCK // 2 or scales != blocks[:-1]:
            raise ValueError(
                f"Mxfp4Weight: blocks must be (..., O, I / {BLOCK}, {BLOCK // 2}) and scales (..., O, I / {BLOCK}), "
                f"but are {blocks} and {scales}"
            )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.scales.shape[:-1], BLOCK * self.scales.shape[-1]))

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantise_mxfp4(self.blocks, self.scales).to(dtype)


PackedWeight = Int8Weight | Int4Weight | Fp8Weight | Mxfp4Weight


def pack_nibbles(codes: Tensor) -> Tensor:
    """(..., I) uint8 codes from 0 to 15 -> (..., I / 2) uint8, the first of each two in the low four bits."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _check_channels(name: str, weight: Tensor, scale: Tensor) -> None:
    if weight.dim() < 2:
        raise ValueError(f"{name}.weight must be (..., O, I), but is {tuple(weight.shape)}")
    _require_type(f"{name}.scale", scale, torch.float32)
    _require_shape(f"{name}.scale", scale, tuple(weight.shape[:-1]))


def _require_type(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(str, allowed))}, but is {tensor.dtype}")


def _require_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must be {expected}, but is {tuple(tensor.shape)}")
