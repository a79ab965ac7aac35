from __future__ import annotations

import json

import pytest
import torch
from adapter_families import adapted, randomize
from tiny_house import random_ids, tokenizer

import grist_model
from grist_model import lora
from grist_model.lora_config import LoraConfig
from grist_tools.merge_adapter import main, merge_adapter


@pytest.fixture
def adapter(model_directory, tmp_path):
    """An adapter of the model in `model_directory`, and the logits of the two together."""
    subject = grist_model.load(model_directory)
    lora.attach(subject, lora.adapter_shape(subject.config, LoraConfig(rank=2, alpha=4.0)))
    randomize(subject)
    grist_model.save_adapter(subject, tmp_path / "adapter", base=str(model_directory))
    with torch.no_grad():
        return tmp_path / "adapter", subject(random_ids(1, 12))


def test_the_merged_directory_computes_what_both_did(adapter, model_directory, tmp_path, capsys):
    directory, want = adapter
    assert main([str(directory), "--out", str(tmp_path / "merged")]) == 0
    assert "a model of the family gpt_oss, with the adapter folded in" in capsys.readouterr().out
    with torch.no_grad():
        torch.testing.assert_close(grist_model.load(tmp_path / "merged")(random_ids(1, 12)), want, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "merged/tokenizer.json").read_bytes() == (model_directory / "tokenizer.json").read_bytes()
    merge_adapter(directory, tmp_path / "half", dtype="bfloat16")
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def test_a_base_stored_in_bfloat16_is_summed_in_float32_and_stays_bfloat16(adapter, model_directory, tmp_path):
    directory, _ = adapter
    base = grist_model.load(model_directory, dtype=torch.bfloat16)
    grist_model.save(base, tmp_path / "base", tokenizer=tokenizer())
    merge_adapter(directory, tmp_path / "merged", base=str(tmp_path / "base"))
    wide = grist_model.merge(grist_model.load_adapter(base.float(), directory))
    stored = grist_model.load(tmp_path / "merged").state_dict()
    for name, tensor in wide.state_dict().items():
        assert stored[name].dtype == torch.bfloat16
        assert torch.equal(stored[name], tensor.bfloat16()), name


def test_what_does_not_fit_is_refused(adapter, tmp_path, capsys):
    directory, _ = adapter
    (tmp_path / "there").mkdir()
    assert main([str(directory), "--out", str(tmp_path / "there")]) == 2
    assert "merge into a new directory" in capsys.readouterr().err
    grist_model.save(grist_model.merge(adapted("llama")), tmp_path / "other")
    assert main([str(directory), "--base", str(tmp_path / "other"), "--out", str(tmp_path / "merged")]) == 2
    assert "is no adapter of this model. unexpected: " in capsys.readouterr().err
    stated = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(stated | {"base_model_name_or_path": None}))
    assert main([str(directory), "--out", str(tmp_path / "merged")]) == 2
    assert "does not say which model it belongs to: give it with --base" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
