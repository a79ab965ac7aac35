"""The quantized formats: which tensors of a family they pack, what a packed tensor is in a file, and what config.json says.

MXFP4 as published GPT-OSS files have it; the rest as compressed-tensors 0.20 writes and reads them, with its presets' names in
parentheses. O outputs, I inputs, G groups.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grist_kernels.moe_mxfp4.dequantise import BLOCK
from grist_kernels.quantized import Fp8Weight, Int4Weight, Int8Weight, Mxfp4Weight, PackedWeight
from grist_model.quantized_reading import (
    BLOCKS,
    COMPRESSED_TENSORS,
    MXFP4,
    PACKED,
    SCALE,
    SCALES,
    SHAPE,
    WEIGHT,
    ZERO,
    pack_zeros,
)
from grist_tools.export_options import Options
from grist_tools.quantize import quantise_fp8, quantise_int8, quantise_mxfp4
from grist_tools.quantize_int4 import quantise_int4

if TYPE_CHECKING:
    from grist_model.config import ModelConfig

Shape = tuple[int, ...]
Parts = dict[str, tuple[torch.dtype, Shape]]

KEPT_TYPE = torch.bfloat16  # of scales, and of all that is not quantized
_PROJECTIONS = re.compile(r"\.(?:[qkvo]_proj|gate_proj|up_proj|down_proj|w[123])\.weight$")
_EXPERTS = re.compile(r"\.mlp\.experts\.(?:gate_up|down)_proj$")
# vLLM and older versions of transformers have routers as Linear too; lm_head is one everywhere.
_IGNORED = ["lm_head", r"re:.*\.gate$"]
_DENSE = ("llama", "qwen3")
_EXPERTS_APART = ("qwen3_moe", "mixtral", "olmoe")


@dataclass(frozen=True)
class Scheme:
    """A way to pack. families: config.json's model_type. names: of the tensors it packs. largest_error,
    largest_kl: squared error of a tensor over its squares, and mean KL divergence, above which the files are taken for broken:
    no sound rounding comes near, and values in the wrong place or of the wrong scale lie beyond.

    parts(name, shape): what stands in the file for a tensor. pack(weight): of a (..., O, I). stored(name, packed): its parts.
    quantization: for config.json. flipped: the file's tensors are (..., I, O). group: inputs that share a scale, 0 for all.
    symmetric: without zero points.
    """

    format: str
    families: tuple[str, ...]
    largest_error: float
    largest_kl: float
    parts: Callable[[str, Shape], Parts]
    pack: Callable[[Tensor], PackedWeight]
    stored: Callable[[str, PackedWeight], dict[str, Tensor]]
    quantization: Mapping[str, Any]
    names: re.Pattern[str] = _PROJECTIONS
    flipped: bool = False
    group: int = 0
    symmetric: bool = True

    def packs(self, name: str) -> bool:
        return self.names.search(name) is not None


SCHEMES = ("mxfp4", "int8", "int8_dynamic", "int4", "fp8")


def scheme_for(format: str, options: Options) -> Scheme:
    if format == "int4":
        return _int4(options)
    return {"mxfp4": _mxfp4, "int8": _int8, "int8_dynamic": _int8_dynamic, "fp8": _fp8}[format]()


def check_fits(scheme: Scheme, family: str, config: ModelConfig, shapes: Mapping[str, Shape]) -> None:
    """Raises ValueError for a family or a size that the scheme cannot hold, and says what fits."""
    if family not in scheme.families:
        fitting = [each for each in SCHEMES if family in scheme_for(each, Options()).families]
        raise ValueError(
            f"{scheme.format} does not fit the layout of {family}: {_why(scheme, family)}; what fits is "
            f"{', '.join(['bf16', 'fp16', 'float32', *fitting, *([] if family == 'gristmill' else ['gguf'])])}"
        )
    if config.experts and not scheme.symmetric:
        raise ValueError("neither transformers nor vLLM reads zero points of experts: leave --asymmetric out")
    for name, shape in shapes.items() if scheme.group else ():
        inputs = shape[-2 if scheme.flipped else -1] if scheme.packs(name) else 0
        if inputs % scheme.group:
            raise ValueError(
                f"{name}: {scheme.format} has groups of {scheme.group}, which do not divide {inputs} inputs"
            )


def _why(scheme: Scheme, family: str) -> str:
    if family == "gristmill":
        return "it is Gristmill's own, for models that no released family expresses, and no other program reads it"
    if scheme.format == "mxfp4":
        return "other programs read MXFP4 in the experts of GPT-OSS only"
    if family == "gpt_oss":
        return "its experts are one tensor a layer, and compressed-tensors packs linear layers"
    if family == "gpt2":
        return "its projections are Conv1D (in, out), some of them fused, and compressed-tensors packs linear layers"
    return "transformers does not read experts whose activations are quantized to int8"


def _module(name: str) -> str:
    return name.removesuffix(WEIGHT)


# MXFP4


def _mxfp4() -> Scheme:
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"quant_method": MXFP4, "modules_to_not_convert": kept}
    return Scheme(
        "mxfp4",
        ("gpt_oss",),
        0.25,
        1.5,
        _mxfp4_parts,
        quantise_mxfp4,
        _mxfp4_stored,
        quantization,
        _EXPERTS,
        True,
        BLOCK,
    )


def _mxfp4_parts(name: str, shape: Shape) -> Parts:
    E, inputs, outputs = shape
    blocks = (E, outputs, inputs // BLOCK)
    return {name + BLOCKS: (torch.uint8, (*blocks, BLOCK // 2)), name + SCALES: (torch.uint8, blocks)}


def _mxfp4_stored(name: str, packed: PackedWeight) -> dict[str, Tensor]:
    assert isinstance(packed, Mxfp4Weight)
    return {name + BLOCKS: packed.blocks, name + SCALES: packed.scales}


# compressed-tensors


def _compressed(format: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    group["input_activations"] = None if inputs is None else {**inputs, "symmetric": True, "dynamic": True}
    group["output_activations"] = None
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": _IGNORED,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _int4(options: Options) -> Scheme:
    """W4A16, or W4A16_ASYM."""
    group, symmetric = options.group, options.symmetric

    def parts(name: str, shape: Shape) -> Parts:
        O, I = shape  # noqa: E741 (the legend's letters)
        module, groups = _module(name), I // group
        found: Parts = {module + PACKED: (torch.int32, (O, I // 8)), module + SCALE: (KEPT_TYPE, (O, groups))}
        if not symmetric:
            found[module + ZERO] = (torch.int32, (-(-O // 8), groups))
        return found | {module + SHAPE: (torch.int64, (2,))}

    def pack(weight: Tensor) -> PackedWeight:
        return quantise_int4(weight, group, symmetric=symmetric, scale_type=KEPT_TYPE)

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric}
    quantization = _compressed("pack-quantized", weights)
    families = _DENSE + _EXPERTS_APART
    return Scheme("int4", families, 0.5, 1.5, parts, pack, _int4_stored, quantization, group=group, symmetric=symmetric)


def _int8() -> Scheme:
    """W8A16, but for the groups: a scale an output channel."""
    quantization = _compressed("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"})
    families = _DENSE + _EXPERTS_APART
    return Scheme("int8", families, 0.05, 0.1, _int8_parts, quantise_int8, _int8_stored, quantization)


def _int8_dynamic() -> Scheme:
    """INT8 (W8A8): activations are quantized a token at a time while the model runs."""
    return Scheme(
        "int8_dynamic",
        _DENSE,
        0.05,
        0.1,
        _parts_of(torch.int8),
        quantise_int8,
        _plain_stored,
        _a_token_at_a_time("int"),
    )


def _fp8() -> Scheme:
    """FP8_DYNAMIC."""
    families, parts = _DENSE + _EXPERTS_APART, _parts_of(torch.float8_e4m3fn)
    return Scheme("fp8", families, 0.05, 0.5, parts, quantise_fp8, _plain_stored, _a_token_at_a_time("float"))


def _a_token_at_a_time(kind: str) -> dict[str, Any]:
    values = {"num_bits": 8, "type": kind}
    return _compressed(f"{kind}-quantized", values | {"strategy": "channel"}, values | {"strategy": "token"})


def _parts_of(dtype: torch.dtype) -> Callable[[str, Shape], Parts]:
    def parts(name: str, shape: Shape) -> Parts:
        return {name: (dtype, shape), _module(name) + SCALE: (KEPT_TYPE, (shape[0], 1))}

    return parts


def _int4_stored(name: str, packed: PackedWeight) -> dict[str, Tensor]:
    assert isinstance(packed, Int4Weight)
    module = _module(name)
    found = {module + PACKED: packed.packed.view(torch.int32), module + SCALE: packed.scale}
    if packed.zero is not None:
        found[module + ZERO] = pack_zeros(packed.zero)
    return found | {module + SHAPE: torch.tensor(packed.shape)}


def _int8_parts(name: str, shape: Shape) -> Parts:
    O, I = shape  # noqa: E741 (the legend's letters)
    module = _module(name)
    parts: Parts = {module + PACKED: (torch.int32, (O, -(-I // 4))), module + SCALE: (KEPT_TYPE, (O, 1))}
    return parts | {module + SHAPE: (torch.int64, (2,))}


def _int8_stored(name: str, packed: PackedWeight) -> dict[str, Tensor]:
    assert isinstance(packed, Int8Weight)
    O, I = packed.shape  # noqa: E741 (the legend's letters)
    codes = torch.zeros(O, -(-I // 4) * 4, dtype=torch.uint8)
    codes[:, :I] = packed.weight.to(torch.int16) + 128
    module = _module(name)
    words, scale = codes.view(torch.int32), packed.scale.to(KEPT_TYPE).unsqueeze(-1)
    return {module + PACKED: words, module + SCALE: scale, module + SHAPE: torch.tensor(packed.shape)}


def _plain_stored(name: str, packed: PackedWeight) -> dict[str, Tensor]:
    assert isinstance(packed, Int8Weight | Fp8Weight)
    return {name: packed.weight, _module(name) + SCALE: packed.scale.to(KEPT_TYPE).unsqueeze(-1)}
