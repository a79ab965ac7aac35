from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_house import PARAGRAPHS

import grist_model
from grist_model.model_card import CardFacts, with_quantization, write_card
from grist_tools import export as export_module
from grist_tools.export import export, main
from grist_tools.export_compare import probe_ids
from grist_tools.export_options import Options
from grist_tools.export_plain import logits


@pytest.mark.parametrize(("name", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("float32", "float32")])
def test_the_directory_has_the_precision_asked_for_and_the_values_of_the_source(model_directory, tmp_path, name, dtype):
    done = export(model_directory, tmp_path / "out", name)
    written, source = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(model_directory / "model.safetensors"),
    )
    wanted = getattr(torch, dtype)
    assert written.keys() == source.keys()
    for key, tensor in written.items():
        assert tensor.dtype == wanted, key
        assert torch.equal(tensor, source[key].to(wanted)), key
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model_directory / "tokenizer.json").read_bytes()
    assert done.agreement is not None
    assert (done.agreement.largest_logit_change == 0) == (name == "float32")
    assert (done.agreement.mean_kl == 0) == (name == "float32")
    assert done.same_best_token == done.agreement.same_best_token > 0.8
    if name != "float32":
        assert done.bytes < 0.6 * done.source_bytes
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]


def test_the_report_tells_how_far_the_logits_moved(model_directory, tmp_path):
    done = export(model_directory, tmp_path / "out", "bf16")
    source, exported = grist_model.load(model_directory), grist_model.load(tmp_path / "out")
    ids = probe_ids(source.config)
    assert done.largest_logit_change == (logits(source, ids) - logits(exported, ids)).abs().max().item() > 0


def test_a_chat_template_goes_along(model_directory, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_directory, source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    export(source, tmp_path / "out", "bf16")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_card_licenses_and_generation_settings_go_along(model_directory, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_directory, source)
    (source / "LICENSE.txt").write_text("all rights")
    write_card(source, CardFacts("Miller", metrics={"perplexity": 7.0}))
    generation = {"eos_token_id": [0, 5], "temperature": 0.5, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(generation))
    export(source, tmp_path / "out", "bf16")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| weights | bfloat16 |" in card
    assert card.replace("bfloat16", "float32") == (source / "README.md").read_text()
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "all rights"
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == generation | {"pad_token_id": 0}


def test_a_model_without_tokenizer_is_exported_without(model_directory, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_directory, source, ignore=shutil.ignore_patterns("tokenizer*"))
    export(source, tmp_path / "out", "float32")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_an_export_that_reloads_differently_is_not_published(model_directory, tmp_path, monkeypatch):
    saved = grist_model.save

    def damaging_save(model, directory, **options):
        saved(model, directory, **options)
        file = directory / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(grist_model, "save", damaging_save)
    with pytest.raises(ValueError, match="do not reload to the model"):
        export(model_directory, tmp_path / "out", "bf16")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(model_directory, tmp_path, monkeypatch):
    def full(model, directory, **options):
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(grist_model, "save", full)
    assert main([str(model_directory), "--format", "bf16", "--out", str(tmp_path / "out")]) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_rest_of_a_killed_export_is_cleared_away(model_directory, tmp_path):
    rest = tmp_path / ".out.exporting"
    rest.mkdir()
    (rest / "half").write_text("x")
    export(model_directory, tmp_path / "out", "bf16")
    assert not rest.exists()
    assert not (tmp_path / "out" / "half").exists()


def test_values_beyond_float16_are_refused_by_name(model_directory, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_directory, source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"head\.weight has values that fp16 cannot hold"):
        export(source, tmp_path / "out", "fp16")
    export(source, tmp_path / "out", "bf16")


def test_bad_input_is_told(model_directory, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert main([str(model_directory), "--format", "bf16", "--out", str(tmp_path / "there")]) == 2
    assert "exists; export into a new directory" in capsys.readouterr().err
    assert main([str(tmp_path / "absent"), "--format", "bf16", "--out", str(tmp_path / "out")]) == 2
    assert "absent" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown format 'int3'"):
        export(model_directory, tmp_path / "out", "int3")
    with pytest.raises(SystemExit):
        main([str(model_directory), "--format", "int3", "--out", str(tmp_path / "out")])
    assert list(export_module.FORMATS) == "bf16 fp16 float32 mxfp4 int8 int8_dynamic int4 fp8 gguf".split()


def test_a_plain_export_is_measured_on_a_text(model_directory, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("\n".join(PARAGRAPHS), encoding="utf-8")
    given = [
        str(model_directory),
        "--format",
        "bf16",
        "--text",
        str(tmp_path / "book.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "logits identical to the converted model's" in printed
    assert "on book.txt: mean KL divergence" in printed
    assert "bits per byte" in printed


def test_a_text_needs_a_tokenizer_and_two_tokens(model_directory, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("a")
    with pytest.raises(ValueError, match=r"book\.txt has 1 token\(s\); at least 2"):
        export(model_directory, tmp_path / "out", "bf16", Options(text=text))
    shutil.copytree(model_directory, tmp_path / "source", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; leave --text out"):
        export(tmp_path / "source", tmp_path / "out", "bf16", Options(text=text))
    assert not (tmp_path / "out").exists()


def test_gguf_is_a_format_like_the_others(model_directory, tmp_path, capsys):
    pytest.importorskip("gguf")
    given = [str(model_directory), "--format", "gguf", "--kind", "f32", "--pre-tokenizer", "gpt-2"]
    assert main([*given, "--out", str(tmp_path / "model.gguf")]) == 0
    printed = capsys.readouterr().out
    assert "of weights in gguf, 32.00 bits a weight" in printed
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"


def test_a_card_of_ones_own_has_the_figures_at_its_end():
    found = with_quantization("# Mine\n\ntext\n", {"scheme": "int4"})
    assert found == "# Mine\n\ntext\n\n## Quantization\n\n| | |\n|---|---|\n| scheme | int4 |\n"
    assert with_quantization(found, {"scheme": "int4"}) == found
