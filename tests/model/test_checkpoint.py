from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from grist_model import checkpoint, load, replacing, save, weight_files


class FakeTokenizer:
    def __init__(self, vocab_size: int = 97):
        self.vocab_size, self.eot_id, self.bos_id = vocab_size, 96, None

    def save(self, directory) -> None:
        (directory / "tokenizer.json").write_text(f'{{"size": {self.vocab_size}}}')


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def edit(directory, change) -> None:
    """Rewrite the weights of a saved model after change(dict of tensors)."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_round_trip_is_exact(make_model, ids, tmp_path):
    model = make_model()
    save(model, tmp_path / "model", FakeTokenizer())
    assert names(tmp_path / "model") == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    again = load(tmp_path / "model")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert all(p.requires_grad for p in again.parameters())
    again(ids).sum().backward()
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_config_names_types_and_token_ids(make_model, tmp_path):
    save(make_model(), tmp_path / "model", FakeTokenizer(), dtype=torch.bfloat16)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (96, 96, None)
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 96, "pad_token_id": 96}


def test_types_of_numbers(make_model, ids, tmp_path):
    model = make_model(balance="bias", shared_expert_width=8)
    model.get_buffer("blocks.0.mlp.router.selection_bias").copy_(torch.tensor([0.001, 1.001, -0.25, 0.0]))
    save(model, tmp_path / "half", dtype=torch.bfloat16)
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        again = load(tmp_path / "half", dtype=dtype)
        assert {p.dtype for p in again.parameters()} == {expected}
        assert torch.equal(*(m.get_buffer("blocks.0.mlp.router.selection_bias") for m in (again, model)))
        assert again.rope is not None
        assert again.rope.frequency_P.dtype == torch.float32
        assert torch.isfinite(again(ids)).all()


def test_a_state_dict_saves_like_its_model(make_model, tmp_path):
    model = make_model()
    save(model, tmp_path / "a")
    save({f"_orig_mod.{name}": t for name, t in model.state_dict().items()}, tmp_path / "b", config=model.config)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="needs its config"):
        save(model.state_dict(), tmp_path / "c")
    with pytest.raises(ValueError, match="not the model's own"):
        save(model, tmp_path / "c", config=make_model(layers=2).config)


def test_large_models_are_split_and_indexed(make_model, tmp_path):
    model = make_model()
    save(model, tmp_path / "model", max_file_bytes=20_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert index["metadata"]["total_parameters"] == sum(p.numel() for p in model.parameters())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "model" / file)
    assert torch.equal(load(tmp_path / "model").unembedding, model.unembedding)
    save(model, tmp_path / "model")  # and the pieces go when one file takes their place
    assert names(tmp_path / "model") == ["config.json", "generation_config.json", "model.safetensors"]


def test_saving_again_replaces_the_model_and_keeps_other_files(make_model, ids, tmp_path):
    save(make_model(layers=2), tmp_path / "model", FakeTokenizer())
    (tmp_path / "model" / "NOTES.md").write_text("mine")
    model = load(tmp_path / "model")
    newer = make_model()
    save(newer, tmp_path / "model")
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "NOTES.md").read_text() == "mine"
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert load(tmp_path / "model").config.layers == 3
    model(ids)  # loaded before, its file replaced since


def read(path) -> dict:
    return json.loads(path.read_text())


def test_without_a_tokenizer_the_one_that_stays_keeps_its_ids(make_model, tmp_path):
    directory = tmp_path / "model"
    save(make_model(layers=2), directory, FakeTokenizer(), generation={"eos_token_id": [96, 5], "temperature": 0.7})
    generation = (directory / "generation_config.json").read_bytes()
    save(make_model(), directory)
    assert read(directory / "config.json")["eos_token_id"] == 96
    assert (directory / "generation_config.json").read_bytes() == generation
    save(make_model(), directory, FakeTokenizer())
    assert read(directory / "generation_config.json") == {"eos_token_id": 96, "pad_token_id": 96}


def test_generation_settings_are_written_as_transformers_takes_them(make_model, tmp_path):
    generation = {"eos_token_id": [96, 5], "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
    save(make_model(), tmp_path / "model", FakeTokenizer(), generation=generation)
    written = read(tmp_path / "model" / "generation_config.json")
    assert written == {**generation, "pad_token_id": 96, "do_sample": True}
    assert read(tmp_path / "model" / "config.json")["eos_token_id"] == 96
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    assert (theirs.do_sample, theirs.temperature, theirs.eos_token_id) == (True, 0.7, [96, 5])


def test_files_of_another_tokenizer_do_not_stay(make_model, tmp_path):
    directory = tmp_path / "model"
    save(make_model(), directory, FakeTokenizer())
    for name in ("merges.txt", "chat_template.jinja", "special_tokens_map.json", "NOTES.md"):
        (directory / name).write_text("old")
    save(make_model(), directory, FakeTokenizer())  # the same again: what was added to it stays
    assert (directory / "chat_template.jinja").exists()
    save(make_model(), directory, FakeTokenizer(90))
    assert names(directory) == [
        "NOTES.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_directories_without_a_model_are_left_alone(make_model, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds no model"):
        save(make_model(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="holds no model"):
        save(make_model(), tmp_path / "file")
    assert names(tmp_path) == ["file", "thesis.txt"]


@pytest.mark.parametrize("fails", ["save_file", "_write_config", "carry_over"])
def test_a_full_disk_leaves_the_old_model(make_model, tmp_path, monkeypatch, fails):
    save(make_model(layers=2), tmp_path / "model")

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    module = {"save_file": weight_files, "_write_config": checkpoint, "carry_over": replacing}[fails]
    monkeypatch.setattr(module, fails, no_space)
    with pytest.raises(OSError, match="No space left"):
        save(make_model(), tmp_path / "model")
    monkeypatch.undo()
    assert load(tmp_path / "model").config.layers in ((2,) if fails != "carry_over" else (2, 3))
    save(make_model(layers=4), tmp_path / "model")
    assert load(tmp_path / "model").config.layers == 4
    assert names(tmp_path) == ["model"]


def test_a_save_killed_between_the_two_renames_is_repaired(make_model, tmp_path):
    save(make_model(layers=2), tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / ".model.replaced")
    shutil.copytree(tmp_path / ".model.replaced", tmp_path / ".model.saving")
    with pytest.raises(FileNotFoundError, match=r"interrupted save left the last model in .*\.model\.replaced"):
        load(tmp_path / "model")
    save(make_model(), tmp_path / "model")
    assert load(tmp_path / "model").config.layers == 3
    assert names(tmp_path) == ["model"]


def test_states_that_do_not_match_are_refused(make_model, tmp_path):
    model = make_model()
    state = model.state_dict()
    state["blocks.0.attention.q.weight"] = torch.zeros(2, 2)
    del state["norm.weight"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(
        ValueError,
        match=r"missing: norm.weight; unexpected: extra; misshapen: blocks.0.attention.q.weight is \(2, 2\), "
        r"expected \(64, 32\)",
    ):
        save(state, tmp_path / "model", config=model.config)
    with pytest.raises(ValueError, match="meta device"):
        save(make_model().to("meta"), tmp_path / "model")
    with pytest.raises(ValueError, match="tokenizer has 98 tokens, but the model's vocab_size is only 97"):
        save(model, tmp_path / "model", FakeTokenizer(98))
    assert names(tmp_path) == []


def test_files_that_do_not_match_are_refused_with_a_list(make_model, tmp_path):
    save(make_model(), tmp_path / "model")

    def change(tensors):
        del tensors["model.layers.1.self_attn.sinks"]
        del tensors["lm_head.weight"]
        tensors["model.layers.0.self_attn.rotary.inv_freq"] = torch.zeros(8)
        tensors["model.norm.weight"] = torch.zeros(31)

    edit(tmp_path / "model", change)
    with pytest.raises(ValueError, match="does not match") as error:
        load(tmp_path / "model")
    message = str(error.value)
    assert "missing: model.layers.1.self_attn.sinks, lm_head.weight" in message
    assert "unexpected: model.layers.0.self_attn.rotary.inv_freq (in model.safetensors)" in message
    assert "model.norm.weight (in model.safetensors) is (31,), expected (32,)" in message


def test_a_repeated_tied_head_must_be_equal(make_model, tmp_path):
    model = make_model(tied_embeddings=True)
    save(model, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    edit(tmp_path / "model", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load(tmp_path / "model").embedding.weight, model.embedding.weight)
    edit(tmp_path / "model", lambda t: t["lm_head.weight"].zero_())
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(tmp_path / "model")


def test_missing_and_damaged_files_are_named(make_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a model directory"):
        load(tmp_path / "nowhere")
    save(make_model(), tmp_path / "model", max_file_bytes=20_000)
    second = sorted((tmp_path / "model").glob("model-*.safetensors"))[1]
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{second.name} is damaged"):
        load(tmp_path / "model")
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {second.name}"):
        load(tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match="files outside its directory"):
        load(tmp_path / "model")
    index.unlink()
    with pytest.raises(FileNotFoundError, match="never from pickled files"):
        load(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load(tmp_path / "model")


def test_views_of_one_storage_can_be_saved(make_model, tmp_path):
    """Gathered states may be slices of one buffer."""
    model = make_model()
    flat = torch.cat([t.flatten() for t in model.state_dict().values()])
    state, start = {}, 0
    for name, tensor in model.state_dict().items():
        state[name] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    save(state, tmp_path / "model", config=model.config)
    assert torch.equal(load(tmp_path / "model").unembedding, model.unembedding)
