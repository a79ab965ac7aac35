"""A model whose weights stay packed computes what the numbers they stand for compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantized_models
import torch
from assertions import assert_close

import grist_model
from grist_kernels import native
from grist_model.quantized_layers import QuantizedExperts, QuantizedLinear, is_quantized
from grist_tools.export_options import Options
from grist_tools.export_quantized import write_quantized
from grist_tools.export_schemes import scheme_for

OPTIONS = Options(group=32)
CASES = [
    ("llama", "int8"), ("llama", "int4"), ("llama", "fp8"), ("llama", "int8_dynamic"), ("qwen3", "int4"), ("qwen3_moe", "int8"),
    ("qwen3_moe", "int4"), ("mixtral", "fp8"), ("gpt_oss", "mxfp4"),
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """(family, format) -> a quantized directory."""
    made: dict[tuple[str, str], Path] = {}
    root = tmp_path_factory.mktemp("quantized")

    def of(family: str, format: str) -> Path:
        if (family, format) not in made:
            source = root / family
            if not source.exists():
                quantized_models.directory_of(family, source)
            made[family, format] = root / f"{family}-{format}"
            write_quantized(source, made[family, format], scheme_for(format, OPTIONS), OPTIONS, None)
        return made[family, format]

    return of


def ids_of(model: grist_model.Transformer, tokens: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("setting", ["auto", "0"])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_logits_are_those_of_the_numbers(directory, case, setting):
    packed = grist_model.load(directory(*case), torch.float32, quantized=True).eval()
    plain = grist_model.load(directory(*case), torch.float32).eval()
    assert is_quantized(packed)
    assert not is_quantized(plain)
    with torch.no_grad(), native.using(setting):
        for tokens in (1, 3, 40):  # 2, 6 and 80 rows: in C, in C, and dequantised
            ids = ids_of(plain, tokens)
            assert_close(f"{tokens} tokens", packed(ids), plain(ids), atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_it_writes_the_same_text(directory, case):
    packed = grist_model.load(directory(*case), torch.float32, quantized=True).eval()
    plain = grist_model.load(directory(*case), torch.float32).eval()
    prompt = ids_of(plain, 8)[0].tolist()
    texts = [grist_model.generate(model, prompt, max_new_tokens=12, temperature=0) for model in (packed, plain)]
    assert texts[0] == texts[1]


def test_parts_keep_their_types_when_the_rest_is_cast(directory):
    for case in (("llama", "int8"), ("llama", "fp8"), ("qwen3_moe", "int4"), ("gpt_oss", "mxfp4")):
        model = grist_model.load(directory(*case), torch.float32, quantized=True)
        before = {name: buffer.dtype for name, buffer in model.named_buffers()}
        model.bfloat16()
        assert {name: buffer.dtype for name, buffer in model.named_buffers()} == before
        with torch.no_grad():
            assert model(ids_of(model, 3)).dtype == torch.bfloat16


def test_parts_move(directory):
    model = grist_model.load(directory("qwen3_moe", "int8"), quantized=True).to("meta")
    for module in model.modules():
        if isinstance(module, QuantizedLinear | QuantizedExperts):
            assert all(part.is_meta for weight in module._weights.values() for part in weight.tensors.values())


def test_it_takes_a_fraction_of_the_memory(directory):
    sizes = []
    for quantized in (False, True):
        model = grist_model.load(directory("llama", "int8"), torch.float32, quantized=quantized)
        linears = [
            module for name, module in model.blocks.named_modules() if name.endswith((".q", ".gate_up", ".down"))
        ]
        sizes.append(sum(t.nbytes for module in linears for t in (*module.parameters(), *module.buffers())))
    assert sizes[1] < 0.28 * sizes[0]


def test_there_is_nothing_to_save(directory, tmp_path):
    model = grist_model.load(directory("llama", "int8"), quantized=True)
    assert not any("attention.q" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="weights are quantized, which save does not write"):
        grist_model.save(model, tmp_path / "out")


def test_a_directory_that_is_not_quantized(tmp_path):
    quantized_models.directory_of("llama", tmp_path / "model")
    with pytest.raises(ValueError, match="no weights here are quantized: leave quantized=True"):
        grist_model.load(tmp_path / "model", quantized=True)


def test_a_bias_is_added(directory):
    model = grist_model.load(directory("qwen3", "int4"), torch.float32, quantized=True)
    layer = model.get_submodule("blocks.0.attention.q")
    assert isinstance(layer, QuantizedLinear)
    assert layer.bias is not None
    x = torch.randn(2, layer.packed.shape[1])
    with torch.no_grad():
        assert_close("y", layer(x), x @ layer.packed.dequantise().T + layer.bias, atol=1e-4)
    assert "int4" in repr(layer)
