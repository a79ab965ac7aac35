"""Quantized directories in transformers 5 with compressed-tensors 0.20: the same bytes, and the same numbers as ours.

make test-clients ARGS=tests/clients/test_compressed_tensors.py
"""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch
from quantized_models import directory_of, logits_of
from safetensors.torch import load_file

import grist_model
from grist_model.quantized_reading import pack_zeros
from grist_tools.export import export
from grist_tools.export_options import Options

pytestmark = pytest.mark.clients
pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers", minversion="5.0")

_GROUPS = Options(group=32)
_DENSE = [(family, format) for family in ("llama", "qwen3") for format in ("int4", "int8", "int8_dynamic", "fp8")]
_EXPERTS = [(family, format) for family in ("qwen3_moe", "mixtral", "olmoe") for format in ("int4", "int8", "fp8")]


def exported(tmp_path, family, format, options=None):
    source = directory_of(family, tmp_path / "source")
    export(source, tmp_path / "out", format, options or (_GROUPS if format == "int4" else Options()))
    return tmp_path / "out"


def logits_in_transformers(directory, dtype, **options) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", **options
    ).eval()
    if options:  # nothing is packed any more, so that bfloat16 numbers can be computed with in float32, as here
        model = model.float()
    vocab_size = model.config.vocab_size
    with torch.no_grad():
        return model(torch.randint(vocab_size, (2, 24), generator=torch.Generator().manual_seed(5))).logits


def ours_in_bfloat16(directory) -> torch.Tensor:
    """The numbers that a model in its own type has, computed with in float32."""
    grist_model.save(grist_model.load(directory), directory.parent / "rounded")
    return logits_of(directory.parent / "rounded")


@pytest.mark.parametrize(("family", "format"), [*_DENSE, *_EXPERTS])
def test_dequantised_on_loading_the_logits_are_ours(tmp_path, family, format):
    directory = exported(tmp_path, family, format)
    dequantize = transformers.CompressedTensorsConfig(dequantize=True)
    found = logits_in_transformers(directory, torch.bfloat16, quantization_config=dequantize)
    assert (found - ours_in_bfloat16(directory)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_zero_points_are_read_when_dequantised_on_loading(tmp_path, family):
    """Left packed, transformers 5.23 expects them unpacked and refuses the file that compressed-tensors itself writes."""
    directory = exported(tmp_path, family, "int4", Options(group=32, symmetric=False))
    dequantize = transformers.CompressedTensorsConfig(dequantize=True)
    found = logits_in_transformers(directory, torch.bfloat16, quantization_config=dequantize)
    assert (found - ours_in_bfloat16(directory)).abs().max() < 1e-4


def test_mxfp4_is_read_as_it_is(tmp_path):
    directory = exported(tmp_path, "gpt_oss", "mxfp4")
    assert (logits_in_transformers(directory, torch.float32) - logits_of(directory)).abs().max() < 1e-4


@pytest.mark.parametrize("format", ["int4", "int8", "int8_dynamic", "fp8"])
def test_the_parts_are_those_that_compressed_tensors_decompresses_to_our_numbers(tmp_path, format):
    directory = exported(tmp_path, "llama", format)
    stored = load_file(directory / "model.safetensors")
    given = json.loads((directory / "config.json").read_text())["quantization_config"]
    settings = import_module("compressed_tensors.quantization").QuantizationConfig.model_validate(given)
    scheme = settings.config_groups["group_0"]
    compressor = import_module("compressed_tensors.compressors").BaseCompressor.get_value_from_registry(settings.format)
    module = "model.layers.1.mlp.down_proj"
    parts = {
        name.removeprefix(f"{module}."): tensor for name, tensor in stored.items() if name.startswith(f"{module}.")
    }
    parts["weight_scale"] = parts["weight_scale"].float()
    grist_model.save(grist_model.load(directory, dtype=torch.float32), tmp_path / "saved")
    ours = load_file(tmp_path / "saved" / "model.safetensors")[f"{module}.weight"]
    assert torch.equal(compressor.decompress(parts, scheme)["weight"], ours)
    packed = compressor.compress({"weight": ours, "weight_scale": parts["weight_scale"]}, scheme)
    for name in parts.keys() - {"weight_scale"}:
        assert torch.equal(packed[name].view(torch.uint8), parts[name].view(torch.uint8)), name


def test_zero_points_are_packed_as_compressed_tensors_packs_them(tmp_path):
    helpers = import_module("compressed_tensors.compressors.pack_quantized.helpers")
    for outputs in (1, 8, 13, 64):
        zeros = torch.randint(16, (outputs, 5))
        theirs = helpers.pack_to_int32((zeros - 8).to(torch.int8), 4, packed_dim=0)
        assert torch.equal(pack_zeros(zeros.to(torch.uint8)), theirs)
