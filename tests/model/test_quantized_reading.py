"""Directories with packed weights, written value by value here, and read as the numbers they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantized_models import directory_of
from safetensors.torch import load_file, save_file

import grist_model
from grist_model import ModelConfig
from grist_model.checkpoint import check_directory
from grist_model.quantized_reading import pack_zeros, schemes_of, unpack_zeros

GROUP = 32
_FORMATS = {
    "int4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": True}),
    "int4 with zeros": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False},
    ),
    "int8 packed": ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
    "fp8": ("float-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"}),
}


def settings(kind: str, targets: tuple[str, ...] = ("Linear",), **changes) -> dict:
    """A quantization_config as compressed-tensors writes it."""
    format, weights = _FORMATS[kind]
    group = {"targets": list(targets), "weights": {"type": "int", "dynamic": False, **weights, **changes}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


def words(codes: list[list[int]], bits: int) -> torch.Tensor:
    """Rows of codes as int32, the first in the lowest bits."""
    per_word = 32 // bits
    rows = []
    for row in codes:
        row = row + [0] * (-len(row) % per_word)
        values = [
            sum(code << bits * place for place, code in enumerate(row[at : at + per_word]))
            for at in range(0, len(row), per_word)
        ]
        rows.append([value - (1 << 32) if value >= 1 << 31 else value for value in values])
    return torch.tensor(rows, dtype=torch.int32)


def stored(module: str, kind: str, shape: torch.Size, draw: torch.Generator) -> tuple[dict, torch.Tensor]:
    """Parts of a weight of random codes, and the numbers (float64) that they stand for."""
    O, I = shape  # noqa: E741 (outputs, inputs)
    groups = I // GROUP if kind.startswith("int4") else 1
    scale = torch.rand(O, groups, generator=draw).add(0.1).div(16).bfloat16()
    parts = {f"{module}.weight_scale": scale}
    wide = scale.double().repeat_interleave(I // groups, 1)
    if kind == "fp8":
        weight = torch.randn(O, I, generator=draw).to(torch.float8_e4m3fn)
        return parts | {f"{module}.weight": weight}, weight.double() * wide
    codes = torch.randint(16 if kind.startswith("int4") else 256, (O, I), generator=draw)
    if kind == "int8":
        return parts | {f"{module}.weight": (codes - 128).to(torch.int8)}, (codes - 128) * wide
    bits, middle = (4, 8) if kind.startswith("int4") else (8, 128)
    parts[f"{module}.weight_packed"] = words(codes.tolist(), bits)
    parts[f"{module}.weight_shape"] = torch.tensor(list(shape))
    if kind == "int4 with zeros":
        zeros = torch.randint(16, (O, groups), generator=draw)
        parts[f"{module}.weight_zero_point"] = words(zeros.T.tolist(), 4).T.contiguous()
        return parts, (codes - zeros.repeat_interleave(GROUP, 1)) * wide
    return parts, (codes - middle) * wide


def quantized(directory: Path, kind: str, family: str = "llama", like: str = "_proj.weight") -> dict[str, torch.Tensor]:
    """Replace the projections of a small model by random codes; the numbers by name, all other tensors in bfloat16."""
    directory_of(family, directory)
    file, draw = directory / "model.safetensors", torch.Generator().manual_seed(2)
    tensors, numbers = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}, {}
    for name in [name for name in tensors if name.endswith(like)]:
        parts, numbers[name] = stored(name.removesuffix(".weight"), kind, tensors.pop(name).shape, draw)
        tensors |= parts
    save_file(tensors, file, metadata={"format": "pt"})
    change_config(directory, dtype="bfloat16", quantization_config=settings(kind))
    return numbers


def change_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def saved_again(directory: Path, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """What `load` reads, by the file's names."""
    grist_model.save(grist_model.load(directory, dtype=dtype), directory.parent / "again")
    return load_file(directory.parent / "again" / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("kind", _FORMATS)
def test_every_number_is_the_one_it_stands_for(tmp_path, kind, family):
    numbers = quantized(tmp_path / "model", kind, family)
    found = saved_again(tmp_path / "model", torch.float32)
    assert len(numbers) >= 14
    for name, expected in numbers.items():
        assert torch.equal(found[name], expected.float()), name
    check_directory(tmp_path / "model")


@pytest.mark.parametrize("kind", _FORMATS)
def test_without_a_type_the_model_has_that_of_config_json(tmp_path, kind):
    numbers = quantized(tmp_path / "model", kind)
    found = saved_again(tmp_path / "model", None)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, expected in numbers.items():
        assert torch.equal(found[name], expected.float().bfloat16()), name


@pytest.mark.parametrize("kind", _FORMATS)
def test_a_model_that_is_built_is_filled(tmp_path, kind):
    quantized(tmp_path / "model", kind)
    expected = grist_model.load(tmp_path / "model", dtype=torch.float32)
    model = grist_model.build(expected.config)
    grist_model.load_into(model, tmp_path / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_groups_go_by_name_then_pattern_then_class(tmp_path):
    numbers = quantized(tmp_path / "model", "int4")
    others = quantized(tmp_path / "other", "fp8", like="down_proj.weight")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "down_proj" not in name}
    tensors |= {n: t for n, t in load_file(tmp_path / "other" / "model.safetensors").items() if "down_proj" in n}
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    both = settings("int4")
    down = settings("fp8", (r"re:.*down_proj$",))["config_groups"]["group_0"] | {"format": "float-quantized"}
    both["config_groups"]["group_1"] = down
    change_config(tmp_path / "model", quantization_config=both | {"format": "mixed-precision"})
    with pytest.raises(ValueError, match="mixed-precision int 4 group"):
        grist_model.load(tmp_path / "model")
    both["config_groups"]["group_0"]["format"] = "pack-quantized"
    change_config(tmp_path / "model", quantization_config=both | {"format": "mixed-precision"})
    found = saved_again(tmp_path / "model", torch.float32)
    for name, expected in (numbers | others).items():
        assert torch.equal(found[name], expected.float()), name
    only = settings("int4", ("re:.*q_proj$",))
    change_config(tmp_path / "model", quantization_config=only)
    with pytest.raises(ValueError, match=r"down_proj is quantized, but no target"):
        grist_model.load(tmp_path / "model")


def with_group(**changes) -> dict:
    found = settings("int4")
    found["config_groups"]["group_0"] |= changes
    return found


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"quant_method": "gptq"}, "quantized with gptq: dequantize them to bfloat16 first"),
        (settings("int4") | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (settings("int4") | {"transform_config": {"config_groups": {}}}, "transform_config"),
        (settings("int4") | {"quantization_status": "frozen"}, "quantization_status 'frozen'.* expected compressed"),
        (settings("int4") | {"config_groups": {}}, r"config_groups {}"),
        (settings("int4") | {"format": "marlin-24"}, "marlin-24 int 4 group"),
        (
            settings("int4", num_bits=2),
            r"pack-quantized int 2 group', which is not read here; expected one of: pack-quantized",
        ),
        (settings("int8", strategy="tensor"), r"config_groups\.group_0\.weights \(format, type, num_bits, strategy\)"),
        (settings("int8", symmetric=False), r"weights\.symmetric False"),
        (settings("int4", group_size=48), r"weights\.group_size 48.* expected one of 32, 64, 128"),
        (settings("int4", actorder="group"), r"weights\.actorder 'group'"),
        (settings("int4", dynamic=True), r"weights\.dynamic True"),
        (with_group(input_activations={"num_bits": 8, "dynamic": False}), r"input_activations\.dynamic False"),
        (with_group(output_activations={"num_bits": 8}), "output_activations"),
    ],
)
def test_schemes_that_are_not_read_are_refused_by_their_key(tmp_path, config, why):
    with pytest.raises(ValueError, match=why):
        schemes_of(config)
    quantized(tmp_path / "model", "int4")
    change_config(tmp_path / "model", quantization_config=config)
    with pytest.raises(ValueError, match=why):
        grist_model.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        ("weight_scale", None, "unexpected.*weight_packed"),
        (
            "weight_packed",
            None,
            r"q_proj is quantized, but its model\.layers\.0\.self_attn\.q_proj\.weight_packed is missing",
        ),
        ("weight_shape", None, r"weight_shape is missing"),
        ("weight_zero_point", None, r"weight_zero_point is missing"),
        ("weight_scale", torch.ones(64, 3), r"q_proj\.weight_scale is \(64, 3\), expected \(64, 2\)"),
        ("weight_shape", torch.tensor([64, 32]), r"weight_packed is \(64, 8\), expected \(64, 4\)"),
        (
            "weight_zero_point",
            torch.ones(64, 2, dtype=torch.int32),
            r"weight_zero_point is \(64, 2\), expected \(8, 2\)",
        ),
        ("weight_packed", torch.ones(64, 8), r"q_proj\.weight_packed \(in model\.safetensors\) is F32, expected I32"),
    ],
)
def test_parts_that_do_not_fit_are_told(tmp_path, name, tensor, why):
    quantized(tmp_path / "model", "int4 with zeros")
    file = tmp_path / "model" / "model.safetensors"
    tensors, part = load_file(file), f"model.layers.0.self_attn.q_proj.{name}"
    del tensors[part]
    save_file(tensors | ({} if tensor is None else {part: tensor}), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=why):
        grist_model.load(tmp_path / "model")


def test_a_quantized_config_is_a_config(tmp_path):
    quantized(tmp_path / "model", "int8")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert ModelConfig.from_hf(config) == grist_model.config_of(tmp_path / "model")


def test_packed_weights_without_a_quantization_config_are_unexpected(tmp_path):
    quantized(tmp_path / "model", "int4")
    change_config(tmp_path / "model", quantization_config=None)
    with pytest.raises(ValueError, match=r"missing: .*q_proj\.weight.*unexpected: .*weight_packed"):
        grist_model.load(tmp_path / "model")


@pytest.mark.parametrize("outputs", [1, 7, 8, 13])
def test_zero_points_are_eight_outputs_a_word(outputs):
    zeros = torch.randint(16, (outputs, 3)).to(torch.uint8)
    packed = pack_zeros(zeros)
    assert torch.equal(packed, words(zeros.T.tolist(), 4).T)
    assert torch.equal(unpack_zeros(packed, outputs), zeros)
