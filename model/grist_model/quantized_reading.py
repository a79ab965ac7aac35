"""Quantized weights in a model directory: which schemes are read, and a layout's tensor from the parts that are stored.

MXFP4: experts as X_blocks and X_scales in place of X, as published GPT-OSS files have them. compressed-tensors: linear layers
as pack-quantized int4 and int8, int-quantized int8 and float-quantized fp8 (https://github.com/vllm-project/compressed-tensors).
They are read as the numbers they stand for, in float32; what a scheme does to activations while it runs is not part of a model.

E experts, O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grist_kernels.moe_mxfp4.dequantise import BLOCK
from grist_kernels.quantized import INT4_GROUPS, Fp8Weight, Int4Weight, Int8Weight, Mxfp4Weight, PackedWeight

Shape = tuple[int, ...]
Read = Callable[[str, slice], Tensor]  # name of a stored tensor, rows of its first axis

MXFP4, COMPRESSED_TENSORS = "mxfp4", "compressed-tensors"
BLOCKS, SCALES = "_blocks", "_scales"
WEIGHT, SCALE, PACKED, ZERO, SHAPE = ".weight", ".weight_scale", ".weight_packed", ".weight_zero_point", ".weight_shape"
_FLOATS = ("BF16", "F16", "F32")
_EVERYTHING = slice(None)
_CODES_A_WORD = 8  # of four bits in an int32


@dataclass(frozen=True)
class Scheme:
    """How the linear layers of one config group are stored. kind: int4, int8_packed, int8 or fp8; group: of int4."""

    kind: str
    targets: tuple[str, ...]
    group: int = 0
    symmetric: bool = True


@dataclass(frozen=True)
class Packed:
    """A tensor of the layout that is stored in parts. parts: their names -> the types that they may have, as safetensors spells
    them. shape: what they make, rows being the layout's. type: what a model has them in where no other is asked for. read: the
    numbers, unrounded. packed: the same rows as they are stored, outputs first."""

    parts: Mapping[str, tuple[str, ...]]
    shape: Shape
    type: torch.dtype
    read: Callable[[Read, slice], Tensor]
    packed: Callable[[Read, slice], PackedWeight]


def schemes_of(quantization: Mapping[str, Any] | None) -> tuple[Scheme, ...]:
    """What a quantization_config of config.json says of linear layers; () for none, and for MXFP4.

    Raises ValueError that names the key for a method or scheme that is not read.
    """
    if not quantization or quantization.get("quant_method") == MXFP4:
        return ()
    method = quantization.get("quant_method", "an unknown method")
    if method != COMPRESSED_TENSORS:
        raise ValueError(f"these weights are quantized with {method}: dequantize them to bfloat16 first")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if quantization.get(key):
            raise _unread(key, quantization[key], "nothing")
    if quantization.get("quantization_status", "compressed") != "compressed":
        raise _unread("quantization_status", quantization["quantization_status"], "compressed")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise _unread("config_groups", groups, "an object of groups with targets and weights")
    return tuple(_scheme(name, group, quantization.get("format")) for name, group in groups.items())


# format, type, bits, strategy -> kind
_KINDS: dict[tuple[Any, ...], str] = {
    ("pack-quantized", "int", 4, "group"): "int4",
    ("pack-quantized", "int", 8, "channel"): "int8_packed",
    ("int-quantized", "int", 8, "channel"): "int8",
    ("float-quantized", "float", 8, "channel"): "fp8",
}


def _scheme(name: str, group: Mapping[str, Any], format: Any) -> Scheme:
    where = f"config_groups.{name}"
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    key = (
        group.get("format") or format,
        weights.get("type", "int"),
        weights.get("num_bits", 8),
        weights.get("strategy"),
    )
    if key not in _KINDS:
        known = "; ".join(" ".join(map(str, each)) for each in _KINDS)
        raise _unread(
            f"{where}.weights (format, type, num_bits, strategy)", " ".join(map(str, key)), f"one of: {known}"
        )
    kind, symmetric = _KINDS[key], bool(weights.get("symmetric", True))
    if kind != "int4" and not symmetric:
        raise _unread(f"{where}.weights.symmetric", False, "true for 8 bits")
    if weights.get("actorder") in ("group", "dynamic"):
        raise _unread(f"{where}.weights.actorder", weights["actorder"], "null or static, for there is no g_idx to read")
    if weights.get("dynamic"):
        raise _unread(f"{where}.weights.dynamic", weights["dynamic"], "false")
    if inputs and inputs.get("dynamic") is not True:
        raise _unread(f"{where}.input_activations.dynamic", inputs.get("dynamic"), "true")
    if group.get("output_activations"):
        raise _unread(f"{where}.output_activations", group["output_activations"], "nothing")
    size = weights.get("group_size") or 0
    if kind == "int4" and size not in INT4_GROUPS:
        raise _unread(f"{where}.weights.group_size", size, f"one of {', '.join(map(str, INT4_GROUPS))}")
    return Scheme(kind, tuple(group.get("targets") or ()), size if kind == "int4" else 0, symmetric)


def _unread(key: str, found: Any, expected: str) -> ValueError:
    return ValueError(
        f"quantization_config has {key} {found!r}, which is not read here; expected {expected}. Dequantize the weights to "
        "bfloat16 first"
    )


def find_packed(
    shapes: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    quantization: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
    read: Read,
) -> dict[str, Packed]:
    """Tensors of the layout that are stored in parts, by their names.

    Args:
        shapes: of all stored tensors. expected: of the layout's.
        dtype: of config.json, in which a model has compressed-tensors' weights; None: float32.
        read: of the stored tensors; only shapes (two numbers each) are read here.

    Raises ValueError for parts that are missing or do not fit together.
    """
    found = {
        name.removesuffix(BLOCKS): _mxfp4(name.removesuffix(BLOCKS), shapes)
        for name in shapes
        if name.endswith(BLOCKS) and name not in expected
    }
    schemes = schemes_of(quantization)
    for name in shapes if schemes else ():
        if name.endswith(SCALE) and name not in expected:
            module = name.removesuffix(SCALE)
            found[module + WEIGHT] = _linear(module, _scheme_for(module, schemes), shapes, dtype, read)
    return found


def _scheme_for(module: str, schemes: Iterable[Scheme]) -> Scheme:
    """As compressed-tensors matches: a name or a pattern before a class, of which all these layers are Linear."""
    by_class = []
    for scheme in schemes:
        for target in scheme.targets:
            if target == module or (target.startswith("re:") and re.match(target[3:], module)):
                return scheme
            if target == "Linear":
                by_class.append(scheme)
    if not by_class:
        raise ValueError(f"{module} is quantized, but no target of quantization_config.config_groups matches it")
    return by_class[0]


def _mxfp4(name: str, shapes: Mapping[str, Shape]) -> Packed:
    """(E, I, O) of blocks (E, O, I / 32, 16): read as bfloat16, which holds these numbers exactly."""
    blocks, scales = shapes[name + BLOCKS], shapes.get(name + SCALES)
    if len(blocks) != 4 or blocks[-1] != BLOCK // 2 or scales != blocks[:-1]:
        raise ValueError(
            f"{name}{BLOCKS} is {blocks} and {name}{SCALES} {scales or 'missing'}, but MXFP4 is (E, out, in / "
            f"{BLOCK}, {BLOCK // 2}) and (E, out, in / {BLOCK})"
        )
    E, outputs, n_blocks, _ = blocks

    def packed(stored: Read, rows: slice) -> Mxfp4Weight:
        return Mxfp4Weight(stored(name + BLOCKS, rows), stored(name + SCALES, rows))

    def read(stored: Read, rows: slice) -> Tensor:
        return _transposed_experts(packed(stored, rows))

    return Packed(
        dict.fromkeys((name + BLOCKS, name + SCALES), ("U8",)),
        (E, n_blocks * BLOCK, outputs),
        torch.bfloat16,
        read,
        packed,
    )


def _transposed_experts(packed: Mxfp4Weight) -> Tensor:
    """(E, in, out) bfloat16, an expert at a time: on the way each number takes sixteen times its four bits and more."""
    E, outputs, inputs = packed.shape
    found = torch.empty((E, inputs, outputs), dtype=torch.bfloat16)
    for expert, (blocks, scales) in enumerate(zip(packed.blocks, packed.scales, strict=True)):
        found[expert] = Mxfp4Weight(blocks, scales).dequantise(torch.bfloat16).T
    return found


def _linear(module: str, scheme: Scheme, shapes: Mapping[str, Shape], dtype: torch.dtype | None, read: Read) -> Packed:
    packs = scheme.kind in ("int4", "int8_packed")
    codes = module + (PACKED if packs else WEIGHT)
    kinds = {"int4": "I32", "int8_packed": "I32", "int8": "I8", "fp8": "F8_E4M3"}
    parts = {codes: (kinds[scheme.kind],), module + SCALE: _FLOATS}
    if packs:
        parts[module + SHAPE] = ("I64", "I32")
    if not scheme.symmetric:
        parts[module + ZERO] = ("I32",)
    missing = [name for name in parts if name not in shapes]
    if missing:
        raise ValueError(f"{module} is quantized, but its {', '.join(missing)} is missing: fetch the files again")
    shape = tuple(read(module + SHAPE, _EVERYTHING).tolist()) if packs else shapes[codes]
    _check_parts(module, scheme, shape, {name: shapes[name] for name in parts})

    def packed(stored: Read, rows: slice) -> PackedWeight:
        return _packed_weight(scheme, module, stored, rows, shape)

    def read_rows(stored: Read, rows: slice) -> Tensor:
        return packed(stored, rows).dequantise()

    return Packed(parts, shape, dtype or torch.float32, read_rows, packed)


def _packed_weight(scheme: Scheme, module: str, stored: Read, rows: slice, shape: Shape) -> PackedWeight:
    scale = stored(module + SCALE, rows)
    if scheme.kind == "int4":
        packed = stored(module + PACKED, rows).view(torch.uint8)
        zero = None
        if not scheme.symmetric:  # words hold eight outputs' codes, so rows have none of their own
            zero = unpack_zeros(stored(module + ZERO, _EVERYTHING), shape[0])[rows]
        kept = scale if scale.dtype in (torch.float32, torch.bfloat16) else scale.float()
        return Int4Weight(packed, kept, zero)
    channels = scale.float().squeeze(-1)
    if scheme.kind == "fp8":
        return Fp8Weight(stored(module + WEIGHT, rows), channels)
    if scheme.kind == "int8":
        return Int8Weight(stored(module + WEIGHT, rows), channels)
    codes = stored(module + PACKED, rows).view(torch.uint8)[:, : shape[1]]
    return Int8Weight((codes.to(torch.int16) - 128).to(torch.int8), channels)


def _check_parts(module: str, scheme: Scheme, shape: Shape, found: Mapping[str, Shape]) -> None:
    outputs, inputs = shape if len(shape) == 2 else (0, 0)
    groups = inputs // scheme.group if scheme.group else 1
    words = -(-inputs // (_CODES_A_WORD if scheme.kind == "int4" else 4))
    expected = {
        module + PACKED: (outputs, words),
        module + WEIGHT: (outputs, inputs),
        module + SCALE: (outputs, groups),
        module + ZERO: (-(-outputs // _CODES_A_WORD), groups),
        module + SHAPE: (2,),
    }
    wrong = [
        f"{name} is {shape}, expected {expected[name]}" for name, shape in found.items() if shape != expected[name]
    ]
    if wrong or not outputs or (scheme.group and inputs % scheme.group):
        raise ValueError(f"{module} is stored as {shape} in groups of {scheme.group or inputs}: {'; '.join(wrong)}")


def pack_zeros(zero_OG: Tensor) -> Tensor:
    """(O, G) uint8 -> (O / 8, G) int32: eight outputs a word, the first in its lowest four bits; the rest of the last is 0."""
    O, G = zero_OG.shape  # noqa: E741 (the legend's letters)
    padded = torch.zeros(-(-O // _CODES_A_WORD) * _CODES_A_WORD, G, dtype=torch.int64)
    padded[:O] = zero_OG
    words = (padded.unflatten(0, (-1, _CODES_A_WORD)) << _shifts()[:, None]).sum(1)
    return words.to(torch.int32)


def unpack_zeros(words: Tensor, outputs: int) -> Tensor:
    """What pack_zeros made -> (O, G) uint8."""
    codes = (words.to(torch.int64).unsqueeze(1) >> _shifts()[:, None]) & 15
    return codes.flatten(0, 1)[:outputs].to(torch.uint8)


def _shifts() -> Tensor:
    return torch.arange(0, 4 * _CODES_A_WORD, 4)
