"""Directories that are not what they should be: each an error that names the file and the key, and nothing is written."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grist_model import build, config_of, load, load_into, save

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path], object]


def settings(**changes) -> Change:
    """Keys of config.json set, or taken out where the value is `...`."""

    def change(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    return change


def rope(**changes) -> Change:
    """Keys of rope_parameters."""

    def change(directory: Path) -> None:
        parameters = json.loads((directory / "config.json").read_text())["rope_parameters"] | changes
        kept = {key: value for key, value in parameters.items() if value is not ...}
        settings(rope_parameters=kept)(directory)

    return change


def content(name: str, data: bytes) -> Change:
    return lambda directory: (directory / name).write_bytes(data)


def tensors(change: Callable[[dict], object]) -> Change:
    def rewrite(directory: Path) -> None:
        found = load_file(directory / SINGLE)
        change(found)
        save_file(found, directory / SINGLE, metadata={"format": "pt"})

    return rewrite


def header(change: Callable[[dict], object]) -> Change:
    """The header's JSON changed, with a length that fits and the data as they are."""

    def rewrite(directory: Path) -> None:
        whole = (directory / SINGLE).read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        entries = json.loads(whole[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        (directory / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])

    return rewrite


def cut(at: float) -> Change:
    """The file's first bytes: a count, or a share of all."""

    def shorten(directory: Path) -> None:
        whole = (directory / SINGLE).read_bytes()
        (directory / SINGLE).write_bytes(whole[: at if isinstance(at, int) else int(at * len(whole))])

    return shorten


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"

CONFIGS: dict[str, tuple[Change, str]] = {
    "no config.json": (lambda d: (d / "config.json").unlink(), r"config\.json does not exist: .* no"),
    "not JSON": (content("config.json", b'{"model_type": '), r"config\.json is not valid JSON"),
    "not UTF-8": (content("config.json", b'{"model_type": "\xff"}'), r"config\.json is not valid JSON"),
    "a list": (content("config.json", b"[1]"), r"config\.json must hold a JSON object, but holds a list"),
    "no model_type": (settings(model_type=...), r"config\.json has model_type None, but only gpt_oss, "),
    "unknown architecture": (settings(model_type="mamba"), r"config\.json has model_type 'mamba', but only gpt_oss, "),
    "model_type no text": (settings(model_type=["llama"]), r"config\.json has model_type \['llama'\]"),
    "a missing size": (settings(hidden_size=...), r"config\.json lacks hidden_size"),
    "several missing": (settings(vocab_size=..., num_local_experts=...), r"lacks vocab_size, num_local_experts: fetch"),
    "a size that is null": (settings(num_hidden_layers=None), r"config\.json lacks num_hidden_layers"),
    "a size in letters": (settings(hidden_size="32"), r"config\.json: hidden_size must be a whole number, but is '32'"),
    "a size with a fraction": (settings(hidden_size=32.5), r"hidden_size must be a whole number, but is 32\.5"),
    "a size that is true": (settings(num_hidden_layers=True), r"num_hidden_layers must be a whole number, but is True"),
    "a number in letters": (settings(rope_theta="1e4"), r"rope_theta must be a number, but is '1e4'"),
    "a boolean in letters": (settings(attention_bias="no"), r"attention_bias must be true or false, but is 'no'"),
    "a list in letters": (settings(layer_types="all"), r"layer_types must be a list, but is 'all'"),
    "rope in letters": (settings(rope_parameters="yarn"), r"rope_parameters must be an object, but is 'yarn'"),
    "rope without factor": (rope(factor=...), r"config\.json, rope_parameters lacks factor"),
    "rope with a wrong kind": (rope(factor="8"), r"config\.json, rope_parameters: factor must be a number, but is '8'"),
    "an unknown rope": (rope(rope_type="longrope"), r"rope_type 'longrope', but only default, linear, "),
    "sizes that do not go together": (settings(num_key_value_heads=3), r"config\.json: heads must be a multiple of kv_heads"),
    "quantized weights": (settings(quantization_config={"quant_method": "awq"}), r"quantized with awq: dequantize"),
}  # fmt: skip

WEIGHTS: dict[str, tuple[Change, str]] = {
    "no weights": (lambda d: (d / SINGLE).unlink(), r"lacks model\.safetensors \(weights are read from safetensors only"),
    "an empty file": (content(SINGLE, b""), r"model\.safetensors is damaged .*: copy or download it again, .* 0 bytes"),
    "no safetensors": (content(SINGLE, b"<html>404 not found</html>"), r"model\.safetensors is damaged or no safetensors"),
    "a header cut short": (cut(100), r"model\.safetensors is damaged .* this one has 100 bytes"),
    "a length cut short": (cut(5), r"model\.safetensors is damaged"),
    "data cut short": (cut(0.7), r"model\.safetensors is damaged"),
    "an enormous header": (content(SINGLE, struct.pack("<Q", 1 << 60) + b"{}"), r"model\.safetensors is damaged"),
    "a header that is no JSON": (content(SINGLE, struct.pack("<Q", 8) + b"{'a': 1}"), r"model\.safetensors is damaged"),
    "offsets that overlap": (
        header(lambda h: h[NORM].update(data_offsets=h[EMBEDDING]["data_offsets"])), r"model\.safetensors is damaged"),
    "offsets beyond the end": (
        header(lambda h: h[NORM].update(data_offsets=[x + 10**6 for x in h[NORM]["data_offsets"]])), r"safetensors is damaged"),
    "offsets that do not fit the shape": (header(lambda h: h[NORM].update(shape=[31])), r"model\.safetensors is damaged"),
    "a missing tensor": (tensors(lambda t: t.pop(NORM)), rf"does not match the model's config\. missing: {NORM}"),
    "an extra tensor": (
        tensors(lambda t: t.update(visual=torch.zeros(2))), r"unexpected: visual \(in model\.safetensors\)"),
    "a wrong shape": (
        tensors(lambda t: t.update({NORM: torch.zeros(8)})),
        rf"misshapen: {NORM} \(in model\.safetensors\) is \(8,\), expected \(32,\)"),
    "another rank": (
        tensors(lambda t: t.update({NORM: torch.zeros(32, 1)})), rf"{NORM} .* is \(32, 1\), expected \(32,\)"),
    "integers": (
        tensors(lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int64)})),
        rf"{NORM} \(in model\.safetensors\) is I64, expected F64 or F32 or F16 or BF16\. Convert"),
    "eight-bit floats": (
        tensors(lambda t: t.update({NORM: torch.zeros(32).to(torch.float8_e4m3fn)})), rf"{NORM} .* is F8_E4M3, expected"),
    "bytes": (
        tensors(lambda t: t.update({NORM: torch.zeros(32, dtype=torch.uint8)})), rf"{NORM} .* is U8, expected F64"),
}  # fmt: skip


def in_index(change: Callable[[dict[str, str]], object]) -> Change:
    def rewrite(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index["weight_map"])
        (directory / INDEX).write_text(json.dumps(index))

    return rewrite


def first(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[0]


def repeat_in_the_first(directory: Path) -> None:
    """What the last file holds goes into the first as well."""
    both = load_file(first(directory)) | load_file(sorted(directory.glob("model-*.safetensors"))[-1])
    save_file(both, first(directory), metadata={"format": "pt"})


SHARDS: dict[str, tuple[Change, str]] = {
    "a missing shard": (lambda d: first(d).unlink(), r"lacks model-00001-of-\d+\.safetensors"),
    "a damaged shard": (
        lambda d: first(d).write_bytes(first(d).read_bytes()[:-3]), r"model-00001-of-\d+\.safetensors is damaged"),
    "two shards with one key": (
        repeat_in_the_first, r"is in both .*model-00001-of-\d+\.safetensors and .*model-\d+-of-\d+\.safetensors: one of them"),
    "an index of a key that is not there": (
        in_index(lambda m: m.update(ghost=m[EMBEDDING])),
        r"model\.safetensors\.index\.json says that model-00001-of-\d+\.safetensors holds ghost, but it does not: "),
    "an index of another file": (
        in_index(lambda m: m.update({NORM: m[EMBEDDING]})), rf"index\.json says that model-00001-.* holds {NORM}, but"),
    "a file that the index leaves out": (
        in_index(lambda m: [m.pop(name) for name in [n for n in m if m[n] == m[NORM]]]), rf"missing: .*{NORM}"),
    "an index that is no JSON": (content(INDEX, b"{"), r"index\.json is not valid JSON"),
    "an index without a map": (content(INDEX, b'{"weight_map": ["a"]}'), r"index\.json has no weight_map of tensors to file"),
    "an index of numbers": (content(INDEX, b'{"weight_map": {"a": 1}}'), r"index\.json has no weight_map of tensors to file"),
    "an index of files elsewhere": (
        in_index(lambda m: m.update(x="../other.safetensors")), r"index\.json names files outside its directory"),
    "two sets of weights": (
        lambda d: save_file({"x": torch.zeros(1)}, d / SINGLE), r"has model\.safetensors and model\.safetensors\.index\.json"),
}  # fmt: skip


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused(readers, directory: Path, pattern: str) -> None:
    before = snapshot(directory.parent)
    for reader in readers:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            reader(directory)
        message = str(caught.value)
        assert re.search(pattern, message), message
        assert str(directory) in message
    assert snapshot(directory.parent) == before


@pytest.fixture
def into(make_model):
    """load_into of a model that fits the directory as it was; its weights must stay as they were."""

    def read(directory: Path) -> None:
        model = build(make_model().config)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            load_into(model, directory)
        finally:
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    return read


@pytest.mark.parametrize(("change", "pattern"), CONFIGS.values(), ids=CONFIGS.keys())
def test_settings(make_model, into, tmp_path, change, pattern):
    save(make_model(), tmp_path / "model")
    change(tmp_path / "model")
    refused((load, into, config_of), tmp_path / "model", pattern)


@pytest.mark.parametrize(("change", "pattern"), WEIGHTS.values(), ids=WEIGHTS.keys())
def test_weights(make_model, into, tmp_path, change, pattern):
    save(make_model(), tmp_path / "model")
    change(tmp_path / "model")
    assert config_of(tmp_path / "model").width == 32
    refused((load, into), tmp_path / "model", pattern)


def test_settings_of_another_model(make_model, into, tmp_path):
    save(make_model(), tmp_path / "model")
    settings(num_hidden_layers=4, layer_types=None)(tmp_path / "model")
    refused(
        (load,), tmp_path / "model", r"missing: model\.layers\.3\..*; config\.json and weights must come from one save"
    )
    refused((into,), tmp_path / "model", r"another shape: num_hidden_layers \(4 there, 3 here\)")


@pytest.mark.parametrize(("change", "pattern"), SHARDS.values(), ids=SHARDS.keys())
def test_several_files(make_model, into, tmp_path, change, pattern):
    save(make_model(), tmp_path / "model", max_file_bytes=20_000)
    change(tmp_path / "model")
    refused((load, into), tmp_path / "model", pattern)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"layers": "3"}, r"layers must be a whole number, but is '3'"),
        ({"sinks": 1}, r"sinks must be True or False, but is 1"),
        ({"swiglu_limit": "7"}, r"swiglu_limit must be a number"),
        ({"rope_scaling": {"kind": "linear"}, "yarn": None}, r"rope_scaling must hold kind, factor"),
        ({"yarn": {"factor": 2.0, "original_context": 16, "gamma": 1.0}}, r"yarn must hold factor, original_context"),
        ({"softcap": 30.0}, r"does not know: softcap"),
    ],
)
def test_settings_of_our_own_family(make_model, tmp_path, changes, pattern):
    save(make_model(shared_expert_width=8), tmp_path / "model")
    settings(**changes)(tmp_path / "model")
    refused((load, config_of), tmp_path / "model", pattern)


@pytest.mark.parametrize(
    ("family", "shape", "missing"),
    [
        ("llama", {"experts": 0}, "num_attention_heads"),
        ("mixtral", {}, "num_local_experts"),
        ("olmoe", {"qk_norm": "width", "width": 64}, "num_experts"),
        ("qwen3", {"experts": 0, "qk_norm": "head"}, "intermediate_size"),
        ("qwen3_moe", {"qk_norm": "head"}, "moe_intermediate_size"),
        ("gpt2", {
            "experts": 0, "positions": "learned", "norm": "layer", "activation": "gelu", "mlp_bias": True, "kv_heads": 4,
            "head_width": 8, "yarn": None, "attention_bias": True}, "n_embd"),
    ],
)  # fmt: skip
def test_missing_sizes_of_every_family(make_model, tmp_path, family, shape, missing):
    plain = {"sinks": False, "mlp_bias": False, "router_bias": False, "swiglu_alpha": None, "swiglu_limit": None}
    plain |= {"window_layers": "none", "attention_bias": False}
    assert save(make_model(**plain | shape), tmp_path / "model") == family
    settings(**{missing: ...})(tmp_path / "model")
    refused((load, config_of), tmp_path / "model", rf"config\.json lacks {missing}")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(make_model, tmp_path):
    from grist_model.safetensors_file import SafetensorsFile

    save(make_model(), tmp_path / "model")
    with SafetensorsFile(tmp_path / "model" / SINGLE) as file:
        cut(0.5)(tmp_path / "model")
        last = max(file.entries, key=lambda name: file.entries[name].start)
        with pytest.raises(ValueError, match=r"model\.safetensors has become shorter while it was read"):
            file.read(last)
