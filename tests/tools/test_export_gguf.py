"""GGUF files of ours, read back by the gguf package; test_gguf_llama_cpp.py has llama.cpp compute them."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
import tiny_house
import torch
from family_shapes import SHAPES, model_of
from mxfp4_directory import packed_in_mxfp4
from safetensors.torch import load_file, save_file

import grist_model
from grist_kernels.moe_mxfp4.dequantise import dequantise_mxfp4
from grist_model import ModelConfig, RopeScaling
from grist_tools import export_gguf, gguf_values
from grist_tools.export_gguf import KINDS, write_gguf
from grist_tools.gguf_metadata import model_metadata
from grist_tools.gguf_names import gguf_tensors
from grist_tools.gguf_verify import verify_gguf
from grist_tools.quantize import quantise_mxfp4

gguf = pytest.importorskip("gguf")

REFUSED = {
    ("llama", "dynamic"): "no dynamic rope_scaling",
    ("qwen3", "windows, yarn"): "no attention biases, no windows",
    ("qwen3", "alternating windows"): "no windows",
    ("qwen3_moe", "all weights, llama 3"): "no llama3 rope_scaling, no attention biases, router_weights chosen",
    ("qwen3_moe", "windows"): "no windows",
    ("mixtral", "windows, linear"): "no windows",
    ("olmoe", "chosen weights, yarn"): "no attention biases, router_weights all",
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_house.tokenizer(400)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A model in a directory, and the model."""

    def save(family, name="plain", **options):
        model = model_of(family, name)
        grist_model.save(model, tmp_path / "model", tokenizer, **options)
        return tmp_path / "model", model

    return save


def tensors_of(path):
    """Name -> (type, float32 values) of a file."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape.tolist()[::-1]),
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def keys_of(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("family", SHAPES)
def test_every_kind_of_every_family_is_written_and_verified(tmp_path, tokenizer, family):
    shape = SHAPES[family]["plain"] | {"layers": 1}
    directory = tmp_path / "model"
    grist_model.save(grist_model.build(ModelConfig(**shape)), directory, tokenizer)
    sizes = []
    for kind in KINDS:
        if kind == "mxfp4" and not shape.get("experts"):
            with pytest.raises(ValueError, match=r"mxfp4 is for experts, and .* has none"):
                write_gguf(directory, tmp_path / "mxfp4.gguf", kind)
            continue
        done = write_gguf(directory, tmp_path / f"{kind}.gguf", kind)
        assert done.bytes == done.path.stat().st_size
        assert done.kept_f16 == ()
        sizes.append((done.bits_per_weight, done.bytes))
    f32, f16, bf16, q8_0, q4_0 = sizes[:5]
    assert f32[0] == 32
    assert 16 <= f16[0] == bf16[0] < 18
    assert 8.5 <= q8_0[0] < 10.5
    assert 4.5 <= q4_0[0] < 8
    assert f32[1] > f16[1] == bf16[1] > q8_0[1] > q4_0[1]
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".gguf"}


@pytest.mark.parametrize(("family", "name"), REFUSED, ids=[f"{family}: {name}" for family, name in REFUSED])
def test_what_llama_cpp_does_not_compute_is_refused(saved, tmp_path, family, name):
    directory, _ = saved(family, name)
    with pytest.raises(ValueError, match=f"in llama.cpp has {REFUSED[family, name]}$"):
        write_gguf(directory, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_experts_lie_out_major_with_gate_and_up_apart(saved, tmp_path):
    directory, model = saved("gpt_oss", "plain")
    found = tensors_of(write_gguf(directory, tmp_path / "model.gguf", "f32").path)
    experts = model.state_dict()
    w, b = experts["blocks.1.mlp.experts.w_gate_up"], experts["blocks.1.mlp.experts.b_gate_up"]
    assert np.array_equal(found["blk.1.ffn_gate_exps.weight"][1], w[..., :256].transpose(1, 2).numpy())
    assert np.array_equal(found["blk.1.ffn_up_exps.weight"][1], w[..., 256:].transpose(1, 2).numpy())
    assert np.array_equal(found["blk.1.ffn_up_exps.bias"][1], b[:, 256:].numpy())
    assert np.array_equal(
        found["blk.1.ffn_down_exps.weight"][1], experts["blocks.1.mlp.experts.w_down"].transpose(1, 2).numpy()
    )
    assert np.array_equal(found["blk.3.attn_sinks.weight"][1], experts["blocks.3.attention.sinks"].numpy())
    assert np.array_equal(found["blk.3.post_attention_norm.weight"][1], experts["blocks.3.mlp_norm.weight"].numpy())


def test_llama_rotates_neighbours_and_qwen_halves(saved, tmp_path):
    """Rows 0, 1, 2, 3 of a head in the file of llama are rows 0, 32, 1, 33 of ours."""
    directory, model = saved("llama", "linear, biases")
    found = tensors_of(write_gguf(directory, tmp_path / "llama.gguf", "f32").path)
    ours = model.state_dict()["blocks.2.attention.k.weight"].numpy()
    bias = model.state_dict()["blocks.2.attention.k.bias"].numpy()
    order = np.arange(64).reshape(2, 32).T.ravel()
    assert order[:4].tolist() == [0, 32, 1, 33]
    assert np.array_equal(found["blk.2.attn_k.weight"][1], ours[np.concatenate([order, 64 + order])])
    assert np.array_equal(found["blk.2.attn_k.bias"][1], bias[np.concatenate([order, 64 + order])])
    shutil.rmtree(directory)
    directory, model = saved("qwen3")
    found = tensors_of(write_gguf(directory, tmp_path / "qwen3.gguf", "f32").path)
    assert np.array_equal(found["blk.2.attn_k.weight"][1], model.state_dict()["blocks.2.attention.k.weight"].numpy())


def test_queries_keys_and_values_of_gpt2_are_one_tensor(saved, tmp_path):
    directory, model = saved("gpt2")
    found = tensors_of(write_gguf(directory, tmp_path / "model.gguf", "f32").path)
    ours = [model.state_dict()[f"blocks.0.attention.{x}.weight"] for x in "qkv"]
    assert np.array_equal(found["blk.0.attn_qkv.weight"][1], torch.cat(ours).numpy())
    assert "output.weight" not in found  # tied


def test_a_tied_head_is_repeated_where_llama_cpp_wants_one(saved, tmp_path):
    directory, model = saved("gpt_oss", "yarn, truncated")
    found = tensors_of(write_gguf(directory, tmp_path / "model.gguf", "f32").path)
    assert np.array_equal(found["output.weight"][1], model.state_dict()["embedding.weight"].numpy())


def test_biases_that_gpt_oss_must_have_are_zeros(saved, tmp_path):
    directory, _ = saved("gpt_oss", "linear")
    found = tensors_of(write_gguf(directory, tmp_path / "model.gguf", "f32").path)
    assert found["blk.0.attn_k.bias"][1].tolist() == [0.0] * 128


def test_keys_say_what_the_model_is(saved, tmp_path):
    directory, _ = saved("gpt_oss", "yarn, truncated")
    keys = keys_of(write_gguf(directory, tmp_path / "model.gguf", "q8_0").path)
    assert keys["general.architecture"] == "gpt-oss"
    assert keys["general.file_type"] == 7
    wanted = {
        "context_length": 256, "block_count": 4, "embedding_length": 256, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.key_length": 64, "attention.sliding_window": 32, "expert_count": 4,
        "expert_used_count": 2, "expert_feed_forward_length": 256, "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 32, "rope.freq_base": 150000.0, "vocab_size": 512,
    }  # fmt: skip
    assert {key: keys[f"gpt-oss.{key}"] for key in wanted} == wanted
    assert keys["gpt-oss.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_vectors_norms_routers_and_positions_stay_float32(saved, tmp_path):
    directory, _ = saved("qwen3_moe")
    types = {
        name: kind for name, (kind, _) in tensors_of(write_gguf(directory, tmp_path / "a.gguf", "q4_0").path).items()
    }
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.0.attn_q_norm.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == types["blk.0.ffn_up_exps.weight"] == "Q4_0"
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    types = {
        name: kind for name, (kind, _) in tensors_of(write_gguf(directory, tmp_path / "b.gguf", "mxfp4").path).items()
    }
    assert types["blk.0.attn_q.weight"] == "Q8_0"
    assert types["blk.0.ffn_up_exps.weight"] == "MXFP4"


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0", "mxfp4"])
def test_experts_in_mxfp4_are_taken_over_bit_for_bit(saved, tmp_path, kind):
    directory, _ = saved("gpt_oss", "yarn, truncated")
    stored = packed_in_mxfp4(directory)
    found = tensors_of(write_gguf(directory, tmp_path / "model.gguf", kind).path)
    for layer in (0, 3):
        prefix = f"model.layers.{layer}.mlp.experts."
        numbers = {
            which: dequantise_mxfp4(
                stored[f"{prefix}{which}_proj_blocks"], stored[f"{prefix}{which}_proj_scales"]
            ).numpy()
            for which in ("gate_up", "down")
        }
        expected = {"gate": numbers["gate_up"][:, ::2], "up": numbers["gate_up"][:, 1::2], "down": numbers["down"]}
        for which, values in expected.items():
            type, written = found[f"blk.{layer}.ffn_{which}_exps.weight"]
            assert type == ("F32" if kind == "f32" else "MXFP4")
            assert np.array_equal(written, values), which


def test_mxfp4_has_the_numbers_of_the_same_scheme_elsewhere(saved, tmp_path):
    directory, model = saved("qwen3_moe")
    found = tensors_of(write_gguf(directory, tmp_path / "model.gguf", "mxfp4").path)
    down = model.state_dict()["blocks.0.mlp.experts.w_down"].transpose(1, 2)
    expected = quantise_mxfp4(down).dequantise(torch.float32).numpy()
    assert np.array_equal(found["blk.0.ffn_down_exps.weight"][1], expected)


def test_rows_that_are_no_multiple_of_a_block_are_kept_in_f16_and_named(tmp_path, tokenizer):
    shape = SHAPES["olmoe"]["plain"] | {"vocab_size": 509, "expert_width": 48}
    grist_model.save(grist_model.build(ModelConfig(**shape)), tmp_path / "model", tokenizer)
    done = write_gguf(tmp_path / "model", tmp_path / "model.gguf", "q8_0")
    assert done.kept_f16 == tuple(f"blk.{layer}.ffn_down_exps.weight" for layer in range(4))
    found = tensors_of(done.path)
    assert found["blk.0.ffn_down_exps.weight"][0] == "F16"
    assert found["blk.0.ffn_up_exps.weight"][0] == "Q8_0"
    mixed = write_gguf(tmp_path / "model", tmp_path / "mxfp4.gguf", "mxfp4")
    assert mixed.kept_f16 == done.kept_f16


def test_steps_do_not_change_the_file(saved, tmp_path, monkeypatch):
    directory, _ = saved("gpt2")
    whole = write_gguf(directory, tmp_path / "a.gguf", "q8_0").path.read_bytes()
    monkeypatch.setattr(gguf_values, "_AT_ONCE", 30_000)
    assert write_gguf(directory, tmp_path / "b.gguf", "q8_0").path.read_bytes() == whole


def test_rows_of_the_vocabulary_without_a_token_are_unused(saved, tmp_path):
    directory, _ = saved("llama")
    keys = keys_of(write_gguf(directory, tmp_path / "model.gguf").path)
    assert len(keys["tokenizer.ggml.tokens"]) == 512
    assert keys["tokenizer.ggml.tokens"][511] == "[PAD511]"
    assert keys["tokenizer.ggml.token_type"][511] == 5


@pytest.mark.parametrize("fault", ["a bit", "a tensor", "a key"])
def test_a_file_that_reads_back_otherwise_is_not_published(saved, tmp_path, monkeypatch, fault):
    directory, _ = saved("llama")
    if fault == "a bit":

        def damaged(tensor, type, source):
            for data in gguf_values.encoded(tensor, type, source):
                if tensor.name == "blk.2.ffn_down.weight":
                    data = data.copy()
                    data[100, 40] ^= 64
                yield data

        monkeypatch.setattr(export_gguf, "encoded", damaged)
        message = (
            r"blk\.2\.ffn_down\.weight, from blocks\.2\.mlp\.down\.weight .* is off by up to .* more than Q8_0 rounds"
        )
    elif fault == "a tensor":
        monkeypatch.setattr(export_gguf, "gguf_tensors", lambda source: gguf_tensors(source)[:-1])
        message = r"tensors missing or left over: \['output\.weight'\]"
    else:
        wrong = {"llama.attention.head_count": 8}
        monkeypatch.setattr(export_gguf, "model_metadata", lambda source, kind: model_metadata(source, kind) | wrong)
        message = r"llama\.attention\.head_count is 8, expected 4"
    with pytest.raises(ValueError, match=message):
        write_gguf(directory, tmp_path / "model.gguf", "q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_of_another_model_is_told(saved, tmp_path):
    directory, _ = saved("llama")
    written = write_gguf(directory, tmp_path / "model.gguf", "q8_0").path
    verify_gguf(written, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] += 0.1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight, from blocks\.1\.mlp\.gate_up\.weight"):
        verify_gguf(written, directory)


def test_values_beyond_float16_are_refused_by_name(saved, tmp_path):
    directory, _ = saved("llama")
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"output\.weight has values over 65,504, which f16 cannot hold"):
        write_gguf(directory, tmp_path / "model.gguf", "f16")
    write_gguf(directory, tmp_path / "model.gguf", "bf16")


def test_values_that_are_not_finite_are_refused_by_name(saved, tmp_path):
    directory, _ = saved("llama")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"norm\.weight has values that are not finite"):
        write_gguf(directory, tmp_path / "model.gguf", "q8_0")


def test_settings_of_our_own_are_refused_with_the_reason_of_each_family(tmp_path, tokenizer):
    shape = SHAPES["llama"]["plain"] | {"logit_softcap": 30.0}
    grist_model.save(grist_model.build(ModelConfig(**shape)), tmp_path / "model", tokenizer)
    with pytest.raises(ValueError, match=r"no architecture of llama\.cpp has") as error:
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 7
    assert "  Llama has no logit_softcap" in lines


def test_bad_input_is_told(saved, tmp_path):
    directory, _ = saved("llama")
    with pytest.raises(ValueError, match="unknown kind 'q3'; there are f32, f16, bf16, q8_0, q4_0, mxfp4"):
        write_gguf(directory, tmp_path / "model.gguf", "q3")
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="exists; export to a new file"):
        write_gguf(directory, tmp_path / "there.gguf")
    assert (tmp_path / "there.gguf").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="absent"):
        write_gguf(tmp_path / "absent", tmp_path / "model.gguf")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        write_gguf(directory, tmp_path / "model.gguf")


def test_a_disk_without_space_is_told_before_anything_is_written(saved, tmp_path, monkeypatch):
    directory, _ = saved("llama")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(export_gguf.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"model\.gguf needs 0\.0 GiB, but its disk has 0\.0 GiB free"):
        write_gguf(directory, tmp_path / "model.gguf")


def test_a_missing_package_is_told(saved, tmp_path, monkeypatch):
    directory, _ = saved("llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install gristmill\[export\]"):
        write_gguf(directory, tmp_path / "model.gguf")


def test_what_differs_in_llama_cpp_is_warned_of(tmp_path, tokenizer):
    shape = SHAPES["gpt_oss"]["yarn"]
    grist_model.save(grist_model.build(ModelConfig(**shape)), tmp_path / "model", tokenizer)
    done = write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    (warning,) = done.warnings
    assert "llama.cpp rounds the ends of YaRN's ramp" in warning


def test_llama3_factors_are_those_of_the_rotation(tmp_path, tokenizer):
    scaling = RopeScaling("llama3", 8.0, original_context=64)
    shape = SHAPES["llama"]["plain"] | {"rope_scaling": scaling}
    grist_model.save(grist_model.build(ModelConfig(**shape)), tmp_path / "model", tokenizer)
    factors = tensors_of(write_gguf(tmp_path / "model", tmp_path / "a.gguf").path)["rope_freqs.weight"][1]
    assert factors[0] == 1.0  # turns fast: kept
    assert factors[-1] == pytest.approx(8.0)
    assert (np.diff(factors) >= 0).all()
