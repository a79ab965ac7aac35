"""Adapters in PEFT's format: what we write PEFT computes with, what PEFT writes we read, and the rest is refused by name."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from adapter_families import FAMILIES, adapted
from safetensors.torch import load_file, save_file
from tiny_house import model, random_ids

import grist_model
from grist_model import lora
from grist_model.adapters import read_adapter

IDS = random_ids(2, 12)
TARGETS = [("all",), ("q", "v"), ("o", "gate"), ("w_down",), ("w_gate_up",)]
FITTING = [
    (family, targets)
    for family, shape in FAMILIES.items()
    for targets in TARGETS
    if targets[0] != "o" or (shape.get("experts") == 0 and family != "gpt2")
    if not targets[0].startswith("w_") or shape.get("experts") != 0
]


@pytest.mark.parametrize(("family", "targets"), FITTING)
def test_what_is_written_is_read_again(tmp_path, family, targets):
    subject = adapted(family, targets=targets, rs=True)
    grist_model.save_adapter(subject, tmp_path)
    again = grist_model.load_adapter(model(**FAMILIES[family]), tmp_path)
    assert {name: pair.rank for name, pair in lora.shape_of(again).items()} == dict.fromkeys(lora.shape_of(subject), 3)
    for name, parameter in subject.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    torch.testing.assert_close(again(IDS), subject(IDS), rtol=1e-6, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "targets"), [each for each in FITTING if each[0] != "gristmill"])
def test_peft_computes_the_same_and_what_it_writes_is_read(tmp_path, family, targets):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    subject = adapted(family, targets=targets)
    plain = model(**FAMILIES[family])
    assert grist_model.save(plain, tmp_path / "base") == family
    grist_model.save_adapter(subject, tmp_path / "ours", base=str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        want = subject(IDS)
        assert float((theirs(IDS).logits - want).abs().max()) < 1e-4
        assert float((plain(IDS) - want).abs().max()) > 0.1
        theirs.save_pretrained(tmp_path / "theirs")
        again = grist_model.load_adapter(grist_model.load(tmp_path / "base"), tmp_path / "theirs")
        assert float((again(IDS) - want).abs().max()) < 1e-4


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_that_peft_made_is_read(tmp_path, use_rslora):
    """One pair for all of c_attn, which no diagonal of blocks expresses; ranks and scales by pattern; layer 1 alone."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    grist_model.save(model(**FAMILIES["gpt2"]), tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    patterns = {} if use_rslora else {"rank_pattern": {"c_fc": 5}, "alpha_pattern": {"h.1.attn.c_attn": 7}}
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"], layers_to_transform=[1], use_rslora=use_rslora,
        fan_in_fan_out=True, **patterns,
    )  # fmt: skip
    theirs = peft.get_peft_model(base, settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
        theirs.save_pretrained(tmp_path / "theirs")
        subject = grist_model.load_adapter(grist_model.load(tmp_path / "base"), tmp_path / "theirs")
        assert set(lora.shape_of(subject)) == {
            f"blocks.1.{name}" for name in ("attention.q", "attention.k", "attention.v", "mlp.up")
        }
        assert float((theirs(IDS).logits - subject(IDS)).abs().max()) < 1e-4
        grist_model.save_adapter(subject, tmp_path / "again")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        back = peft.PeftModel.from_pretrained(base, tmp_path / "again").eval()
        assert float((back(IDS).logits - subject(IDS)).abs().max()) < 1e-4


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_adapter_of_transformers_4_with_a_pair_an_expert_is_read(tmp_path, family):
    """PEFT itself joins these on transformers 5."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    plain = model(**FAMILIES[family])
    grist_model.save(plain, tmp_path / "base")
    experts, names = "mlp.experts", {"gate_proj": (3, 32, 32), "up_proj": (3, 32, 32), "down_proj": (3, 32, 32)}
    if family == "mixtral":
        experts, names = "block_sparse_moe.experts", dict(zip(("w1", "w3", "w2"), names.values(), strict=True))
    tensors = {}
    for layer, expert, (name, (r, inputs, outputs)) in itertools.product(range(2), range(4), names.items()):
        key = f"base_model.model.model.layers.{layer}.{experts}.{expert}.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(r, inputs) * 0.3
        tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, r) * 0.3
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs/adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": sorted(names), "task_type": "CAUSAL_LM"}
    (tmp_path / "theirs/adapter_config.json").write_text(json.dumps(stated))

    subject = grist_model.load_adapter(plain, tmp_path / "theirs")
    assert {pair.rank for name, pair in lora.shape_of(subject).items() if name.endswith("gate_up")} == {6}
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "theirs").eval()
    with torch.no_grad():
        want = theirs(IDS).logits
        assert float((subject(IDS) - want).abs().max()) < 1e-4
        assert float((model(**FAMILIES[family])(IDS) - want).abs().max()) > 0.1


def test_queries_keys_and_values_become_blocks(tmp_path):
    grist_model.save_adapter(adapted("gpt2", targets=("q", "v")), tmp_path)
    lora_b = load_file(tmp_path / "adapter_model.safetensors")[
        "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    ]
    assert lora_b.shape == (96, 6)
    blocks = [[bool(block.any()) for block in rows.split(3, 1)] for rows in lora_b.split(32)]
    assert blocks == [[True, False], [False, False], [False, True]]
    stated = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stated["r"], stated["lora_alpha"], stated["target_modules"]) == (6, 10, ["attn.c_attn"])
    assert stated["fan_in_fan_out"] is True


def test_a_file_names_the_base_and_few_targets(tmp_path):
    subject = adapted("qwen3_moe")
    grist_model.save_adapter(subject, tmp_path, base="hf://someone/model@main")
    stated = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stated["base_model_name_or_path"], stated["revision"]) == ("someone/model", "main")
    assert stated["target_modules"] == [f"self_attn.{name}_proj" for name in "koqv"]
    assert stated["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    grist_model.save_adapter(
        subject, tmp_path, base="/home/me/.cache/huggingface/hub/models--someone--model/snapshots/0a1b"
    )
    stated = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stated["base_model_name_or_path"], stated["revision"]) == ("someone/model", "0a1b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "has peft_type 'LOHA', but only LORA"),
        ({"use_dora": True}, "has use_dora True"),
        ({"bias": "all"}, "has bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save \['lm_head'\]"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base model too"),
        ({"lora_alpha": None}, "must have numbers r and lora_alpha"),
        ({"r": 7}, r"gives model.layers.0.self_attn.q_proj rank 7, but its matrices have rank 3"),
    ],
)
def test_what_is_not_plain_lora_is_refused(tmp_path, changes, message):
    grist_model.save_adapter(adapted("llama", targets=("q",)), tmp_path)
    stated = json.loads((tmp_path / "adapter_config.json").read_text()) | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=message):
        grist_model.load_adapter(model(**FAMILIES["llama"]), tmp_path)


def test_an_adapter_of_another_model_is_refused_with_a_list(tmp_path):
    grist_model.save_adapter(adapted("llama"), tmp_path)
    names = r"unexpected: base_model\.model\.model\.layers\.0\.mlp\.gate_proj\.lora_A\.weight; unexpected: .*"
    with pytest.raises(ValueError, match=names):
        read_adapter(tmp_path, model(**FAMILIES["qwen3_moe"]).config)
    wider = model(**FAMILIES["llama"], width=48).config
    with pytest.raises(
        ValueError, match=r"misshapen: .*q_proj\.lora_A\.weight is \(3, 32\) torch\.float32, expected \(3, 48\); mis"
    ):
        read_adapter(tmp_path, wider)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"this model\. missing: base_model\.model\.model\.layers\.1\.self_attn\.o_proj\.lora_B\.weight$",
    ):
        read_adapter(tmp_path, model(**FAMILIES["llama"]).config)


def test_files_that_are_not_there_or_damaged_are_told(tmp_path):
    config = model(**FAMILIES["llama"]).config
    with pytest.raises(
        FileNotFoundError, match=r"adapter_config.json does not exist: .* holds no adapter in PEFT's format"
    ):
        read_adapter(tmp_path, config)
    grist_model.save_adapter(adapted("llama"), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/adapter_model.safetensors").write_bytes(b"\x10" * 20)
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        read_adapter(tmp_path / "cut", config)
    (tmp_path / "cut/adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="read from safetensors only, never from pickled files"):
        read_adapter(tmp_path / "cut", config)
    with pytest.raises(ValueError, match="has no adapters to save"):
        grist_model.save_adapter(model(**FAMILIES["llama"]), tmp_path / "none")
