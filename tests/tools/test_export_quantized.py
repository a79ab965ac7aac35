"""Exports to packed weights: what is on disk, that it is near the source, and that what is broken is never published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from quantized_models import SHAPES, directory_of, logits_of
from safetensors.torch import load_file, save_file
from tiny_house import PARAGRAPHS, dataset

import grist_model
from grist_model.model_card import CardFacts, write_card
from grist_tools import export_quantized
from grist_tools.block_by_block import logits_of as streamed_logits
from grist_tools.export import export, main
from grist_tools.export_options import Options
from grist_tools.quantize import quantise_mxfp4

_GROUPS = Options(group=32)
_FITTING = [
    ("gpt_oss", "mxfp4", Options()),
    *((family, format, Options()) for family in ("llama", "qwen3") for format in ("int8", "int8_dynamic", "fp8")),
    *((family, format, Options()) for family in ("qwen3_moe", "mixtral", "olmoe") for format in ("int8", "fp8")),
    *((family, "int4", _GROUPS) for family in ("llama", "qwen3", "qwen3_moe", "mixtral", "olmoe")),
    *((family, "int4", Options(group=32, symmetric=False)) for family in ("llama", "qwen3")),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {family: directory_of(family, root / family) for family in SHAPES}


@pytest.mark.parametrize(("family", "format", "options"), _FITTING)
def test_it_reloads_to_predictions_near_the_sources(sources, tmp_path, family, format, options):
    done = export(sources[family], tmp_path / "out", format, options)
    before, after = logits_of(sources[family]), logits_of(tmp_path / "out")
    kl = torch.nn.functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert 0 < kl / before.shape[1] < {"int8": 0.03, "int8_dynamic": 0.03, "fp8": 0.2}.get(format, 0.7)
    assert done.agreement is not None
    assert 0 < done.agreement.mean_kl < 0.7
    assert done.bytes < (0.6 if "8" in format else 0.5) * done.source_bytes
    assert done.bits_per_weight == 8 * done.bytes / grist_model.accounting.parameters(
        grist_model.config_of(tmp_path / "out")
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = json.loads((sources[family] / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] in ("mxfp4", "compressed-tensors")
    assert config == expected | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (sources[family] / name).read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]


def test_only_projections_are_quantized(sources, tmp_path):
    export(sources["qwen3_moe"], tmp_path / "out", "int4", _GROUPS)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    source = load_file(sources["qwen3_moe"] / "model.safetensors")
    packed = {name.removesuffix("_packed") for name in stored if name.endswith("_packed")}
    assert packed == {name for name in source if "_proj" in name}
    for name in source.keys() - packed:
        assert torch.equal(stored[name], source[name].bfloat16()), name
    for name in packed:
        O, I = source[name].shape  # noqa: E741 (outputs, inputs)
        module = name.removesuffix(".weight")
        assert stored[f"{module}.weight_packed"].dtype == torch.int32
        assert stored[f"{module}.weight_packed"].shape == (O, I // 8)
        assert stored[f"{module}.weight_scale"].shape == (O, I // 32)
        assert stored[f"{module}.weight_shape"].tolist() == [O, I]


def test_mxfp4_experts_are_the_encoders_bytes_out_major(sources, tmp_path):
    export(sources["gpt_oss"], tmp_path / "out", "mxfp4")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    source = load_file(sources["gpt_oss"] / "model.safetensors")
    for name in [name for name in source if name.endswith(("gate_up_proj", "down_proj"))]:
        expected = quantise_mxfp4(source[name].mT)
        assert torch.equal(stored[f"{name}_blocks"], expected.blocks)
        assert torch.equal(stored[f"{name}_scales"], expected.scales)
        assert name not in stored
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"][0] == "model.layers.*.self_attn"
    export(tmp_path / "out", tmp_path / "again", "mxfp4")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in stored.items())


def test_saving_what_was_loaded_from_mxfp4_never_writes_numbers_as_blocks(sources, tmp_path):
    export(sources["gpt_oss"], tmp_path / "out", "mxfp4")
    grist_model.save(grist_model.load(tmp_path / "out"), tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert not [name for name in stored if name.endswith(("_blocks", "_scales"))]
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert torch.equal(logits_of(tmp_path / "saved"), logits_of(tmp_path / "out"))
    export(tmp_path / "out", tmp_path / "plain", "bf16")
    assert torch.equal(logits_of(tmp_path / "plain"), logits_of(tmp_path / "out"))


@pytest.mark.parametrize(
    ("family", "format", "options", "why"),
    [
        (
            "llama",
            "mxfp4",
            Options(),
            r"MXFP4 in the experts of GPT-OSS only; what fits is .* int8, int8_dynamic, int4, fp8, gguf",
        ),
        (
            "gpt_oss",
            "int4",
            Options(),
            r"its experts are one tensor a layer.* what fits is bf16, fp16, float32, mxfp4, gguf",
        ),
        ("gpt2", "int8", Options(), r"Conv1D \(in, out\).* what fits is bf16, fp16, float32, gguf$"),
        ("gristmill", "int4", Options(), r"Gristmill's own.* what fits is bf16, fp16, float32$"),
        (
            "mixtral",
            "int8_dynamic",
            Options(),
            "experts whose activations are quantized to int8; what fits is .* int8, int4",
        ),
        ("mixtral", "int4", Options(group=32, symmetric=False), "zero points of experts: leave --asymmetric out"),
        ("llama", "int4", Options(group=128), "q_proj.weight: int4 has groups of 128, which do not divide 64 inputs"),
        ("llama", "int8", Options(gptq=True, calibration=Path("x")), "int8: --gptq is of int4"),
        ("llama", "int8", Options(group=32, symmetric=False), "--group-size is of int4; --asymmetric is of int4"),
        ("llama", "int4", Options(gptq=True), "--gptq needs --calibration DIR"),
        ("llama", "int4", Options(rows=8), "--calibration-rows needs --gptq"),
        ("llama", "fp8", Options(kind="q8_0"), "--kind is of gguf"),
        ("llama", "gguf", Options(text=Path("x")), "--text is not used by gguf"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(sources, tmp_path, family, format, options, why):
    with pytest.raises(ValueError, match=why):
        export(sources[family], tmp_path / "out", format, options)
    assert list(tmp_path.iterdir()) == []


def damaged(monkeypatch, damage) -> None:
    """Have the files of the next export changed after they are written, by a function of name and tensor."""
    write = export_quantized.write_quantized

    def damaging(source, draft, *rest):
        write(source, draft, *rest)
        stored = load_file(draft / "model.safetensors")
        stored = {name: damage(name, tensor) for name, tensor in stored.items()}
        save_file(stored, draft / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export_quantized, "write_quantized", damaging)


@pytest.mark.parametrize(
    ("family", "format", "part"),
    [
        ("gpt_oss", "mxfp4", "_blocks"),
        ("llama", "int8", "_packed"),
        ("llama", "int4", "_packed"),
        ("llama", "int8_dynamic", "down_proj.weight"),
        ("llama", "fp8", "down_proj.weight"),
    ],
)
def test_elements_in_each_others_place_are_not_published(sources, tmp_path, monkeypatch, family, format, part):
    """They are good weights of another model."""
    damaged(monkeypatch, lambda name, x: x.view(torch.uint8).flip(-1).view(x.dtype) if name.endswith(part) else x)
    with pytest.raises(
        ValueError, match=r"_proj.* does not reload to what was quantized: its error is [\d.]+ of its squares"
    ):
        export(sources[family], tmp_path / "out", format, _GROUPS if format == "int4" else Options())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("factor", "kl"), [(30.0, r"[\d.]+"), (float("nan"), "nan")])
def test_predictions_far_from_the_sources_are_not_published(sources, tmp_path, monkeypatch, factor, kl):
    damaged(monkeypatch, lambda name, x: x * factor if name == "lm_head.weight" else x)
    with pytest.raises(
        ValueError, match=rf"mean KL divergence .* is {kl} nats a token, and more than 0\.1 is taken for broken"
    ):
        export(sources["llama"], tmp_path / "out", "int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "format", "tensor"),
    [
        ("llama", "int8", "model.layers.1.mlp.down_proj.weight"),
        ("gpt_oss", "mxfp4", "model.layers.1.mlp.experts.down_proj"),
        ("llama", "fp8", "model.norm.weight"),
    ],
)
def test_values_that_are_not_finite_are_refused_by_name(sources, tmp_path, family, format, tensor):
    shutil.copytree(sources[family], tmp_path / "source")
    stored = load_file(tmp_path / "source" / "model.safetensors")
    stored[tensor].view(-1)[3] = float("nan")
    save_file(stored, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{tensor}.* not finite"):
        export(tmp_path / "source", tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_files_are_split_and_read_again(sources, tmp_path, monkeypatch):
    export(sources["qwen3_moe"], tmp_path / "whole", "int4", _GROUPS)
    monkeypatch.setattr(export_quantized.write_quantized, "__defaults__", (40_000,))
    export(sources["qwen3_moe"], tmp_path / "split", "int4", _GROUPS)
    files = sorted((tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 50_000 for file in files)
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert torch.equal(logits_of(tmp_path / "split"), logits_of(tmp_path / "whole"))


def test_figures_on_a_text_are_printed_and_kept_in_the_card(sources, tmp_path, capsys):
    shutil.copytree(sources["llama"], tmp_path / "source")
    write_card(tmp_path / "source", CardFacts("Miller"))
    (tmp_path / "book.txt").write_text("\n".join(PARAGRAPHS * 3), encoding="utf-8")
    given = [str(tmp_path / "source"), "--format", "int8_dynamic", "--text", str(tmp_path / "book.txt")]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for part in ("bits a weight", "on book.txt: mean KL divergence", "bits per byte", "activations, which the format"):
        assert part in printed, part
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| weights | bfloat16 |" in card
    assert card.index("## Quantization") < card.index("## Limits")
    assert "| scheme | int8 weights and activations" in card
    export(tmp_path / "out", tmp_path / "again", "int8")
    again = (tmp_path / "again" / "README.md").read_text()
    assert again.count("## Quantization") == again.count("## Limits") == 1
    assert "compressed-tensors pack-quantized" in again
    assert "int-quantized" not in again


def test_bits_per_byte_are_those_of_the_evaluation(sources, tmp_path):
    """Over one row of tokens, both predict the same tokens of the same text."""
    from grist_data import Tokenizer

    text = PARAGRAPHS[0]
    (tmp_path / "line.txt").write_text(text, encoding="utf-8")
    done = export(sources["llama"], tmp_path / "out", "int8", Options(text=tmp_path / "line.txt"))
    ids = torch.tensor(Tokenizer.load(sources["llama"]).encode(text))[None, :64]
    n_bytes = len(Tokenizer.load(sources["llama"]).decode(ids[0, 1:].tolist()).encode())
    assert done.agreement is not None
    assert done.agreement.bits_per_byte is not None
    for directory, found in zip((sources["llama"], tmp_path / "out"), done.agreement.bits_per_byte, strict=True):
        model = grist_model.load(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum")
        assert found == pytest.approx(loss.item() / 0.6931471805599453 / n_bytes, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("activation_order", [False, True])
def test_calibrated_int4_is_nearer_to_the_source(sources, tmp_path, family, activation_order):
    tokens = dataset(tmp_path / "tokens")
    rounded = export(sources[family], tmp_path / "rounded", "int4", Options(group=32, calibration=tokens))
    options = Options(group=32, calibration=tokens, gptq=True, activation_order=activation_order)
    calibrated = export(sources[family], tmp_path / "calibrated", "int4", options)
    assert rounded.agreement is not None
    assert calibrated.agreement is not None
    assert rounded.agreement.measured_on == "the val split of tokens"
    assert calibrated.agreement.mean_kl < 0.75 * rounded.agreement.mean_kl
    stored = load_file(tmp_path / "calibrated" / "model.safetensors")
    assert stored.keys() == load_file(tmp_path / "rounded" / "model.safetensors").keys()


def test_a_dataset_of_another_tokenizer_is_refused(sources, tmp_path):
    tokens = dataset(tmp_path / "tokens")
    shutil.copytree(sources["llama"], tmp_path / "source")
    other = json.loads((tmp_path / "source" / "tokenizer.json").read_text())
    other["model"]["merges"] = other["model"]["merges"][:-1]
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="another tokenizer"):
        export(tmp_path / "source", tmp_path / "out", "int4", Options(group=32, calibration=tokens, gptq=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", SHAPES)
def test_a_model_run_block_by_block_is_the_model(sources, family):
    ids = torch.randint(300, (6, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = grist_model.load(sources[family]).eval()(ids)
    assert (streamed_logits(sources[family], ids) - expected).abs().max() < 1e-4 * expected.abs().max()
