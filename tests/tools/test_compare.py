from __future__ import annotations

import json
import shutil

import pytest
from quantized_models import directory_of
from tiny_house import PARAGRAPHS, dataset

import grist_model
from grist_eval.__main__ import main as evaluate
from grist_tools.compare import main
from grist_tools.compare_variants import directory_facts, markdown
from grist_tools.export import export

QUIET = ["--device", "cpu", "--repetitions", "0"]


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """A dense model in float32, bf16 and int8."""
    folder = tmp_path_factory.mktemp("variants")
    source = directory_of("llama", folder / "model")
    for format in ("bf16", "int8"):
        export(source, folder / format, format)
    return [source, folder / "bf16", folder / "int8"]


def compared(tmp_path, variants, *arguments):
    out = tmp_path / "compare.json"
    assert main([*map(str, variants), *QUIET, *arguments, "--out", str(out)]) == 0
    return json.loads(out.read_text())["rows"], out.with_suffix(".md").read_text()


def test_sizes_and_formats_are_those_of_the_files(variants, tmp_path):
    rows, text = compared(tmp_path, variants)
    assert [row["format"] for row in rows] == ["float32", "bfloat16", "compressed-tensors, pack-quantized, int8"]
    parameters = sum(p.numel() for p in grist_model.load(variants[0]).parameters())
    for row, directory in zip(rows, variants, strict=True):
        assert row["bytes"] == (directory / "model.safetensors").stat().st_size
        assert row["parameters"] == parameters
        assert row["bits_per_weight"] == pytest.approx(8 * row["bytes"] / parameters)
    assert rows[0]["bits_per_weight"] > 32 > 17 > rows[1]["bits_per_weight"] > 16 > rows[2]["bits_per_weight"]
    lines = text.splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    assert "bits per byte" not in text
    assert "tokens/s" not in text


def test_a_gguf_file_is_a_variant(variants, tmp_path):
    pytest.importorskip("gguf")
    export(variants[0], tmp_path / "model.gguf", "gguf")
    (_, row), _ = compared(tmp_path, [variants[0], tmp_path / "model.gguf"])
    assert row["format"] == "GGUF F16"
    assert row["bits_per_weight"] == pytest.approx(16, abs=0.5)
    assert row["parameters"] == directory_facts(variants[0])["parameters"]


def test_bits_per_byte_of_a_dataset_are_those_of_the_evaluation(variants, tmp_path):
    folder = dataset(tmp_path / "data")
    rows, text = compared(tmp_path, variants[:2], "--data", str(folder))
    report = tmp_path / "report.json"
    arguments = ["--tasks", "bits_per_byte", "--data", str(folder), "--device", "cpu", "--out", str(report)]
    assert evaluate([str(variants[0]), *arguments]) == 0
    expected = json.loads(report.read_text())["tasks"]["bits_per_byte"]["bits_per_byte"]
    assert rows[0]["bits_per_byte"] == expected
    assert rows[1]["bits_per_byte"] == pytest.approx(expected, rel=0.02)
    assert f"{expected:.4f}" in text
    # The report stands in for the run; only the variant of its weights has a number then.
    again, _ = compared(tmp_path, variants[:2], "--results", str(report))
    assert [row.get("bits_per_byte") for row in again] == [expected, None]


def test_bits_per_byte_of_a_text_need_no_dataset(variants, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(PARAGRAPHS))
    rows, text = compared(tmp_path, variants, "--text", str(file))
    assert all(1 < row["bits_per_byte"] < 20 for row in rows)
    assert rows[2]["bits_per_byte"] == pytest.approx(rows[0]["bits_per_byte"], rel=0.05)
    assert all(f"{row['bits_per_byte']:.4f}" in text for row in rows)


def test_tasks_have_a_column_each(variants, tmp_path):
    questions = tmp_path / "boolq.jsonl"
    row = {"question": "is flour ground from grain", "passage": PARAGRAPHS[0], "label": 1}
    questions.write_text(json.dumps(row) + "\n")
    arguments = ["--tasks", "boolq", "--task-data", f"boolq={questions}", "--shots", "0"]
    rows, text = compared(tmp_path, variants[:1], *arguments)
    found = rows[0]["tasks"]["boolq"]
    assert "boolq" in text.splitlines()[0]
    assert f"{found[found['main']]:.4f}" in text.splitlines()[-1]


def test_speed_is_a_short_profile(variants, tmp_path):
    rows, text = compared(tmp_path, variants[:1], "--latency", "2,8,4", "--repetitions", "1")
    latency = rows[0]["latency"]
    assert (latency["batch"], latency["prompt"], latency["output"]) == (2, 8, 4)
    assert f"{latency['tokens_per_second']:.1f}" in text.splitlines()[-1]


def test_what_a_variant_has_not_is_a_dash():
    rows = [
        {"variant": "a", "format": "float32", "bytes": 4000, "bits_per_weight": 32.0, "bits_per_byte": 1.5},
        {"variant": "b", "format": "GGUF Q8_0", "bytes": 1000, "bits_per_weight": 8.5},
    ]
    assert markdown(rows).splitlines()[-1] == "| b | GGUF Q8_0 | 1000 B | 25% | 8.50 | - |"


@pytest.fixture
def stranger(variants, tmp_path):
    """A report of a model that is not compared."""
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"model": {"files_sha256": {"model.safetensors": "0"}}, "tasks": {}}))
    return report


def test_what_cannot_be_compared_is_told(variants, tmp_path, stranger, capsys):
    model, out = str(variants[0]), str(tmp_path / "out.json")
    (tmp_path / "no.json").write_text("[]")
    shutil.copy2(stranger, tmp_path / "twin.json")
    for arguments, message in [
        ([str(tmp_path)], "no config.json"),
        ([str(tmp_path / "no.gguf")], "there is no"),
        ([model, "--data", "d", "--text", "t"], "measured apart"),
        ([model, "--results", str(tmp_path / "no.json")], "no report of grist_eval"),
        ([model, "--results", str(stranger)], "not of the weights of any variant"),
        ([model, "--results", str(stranger), "--results", str(tmp_path / "twin.json")], "the same weights"),
        ([model, "--latency", "1,60,60", "--repetitions", "1"], "does not fit the context"),
        ([model, "--items-out", "rows.jsonl"], "--items-out is of one model"),
        ([model, "--repetitions", "-1"], "--repetitions must be 0 or more"),
    ]:
        assert main([*QUIET, *arguments, "--out", out]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_a_shape_of_two_numbers_is_told(variants, capsys):
    with pytest.raises(SystemExit):
        main([str(variants[0]), "--latency", "1,64"])
    assert "sequences,prompt,output" in capsys.readouterr().err
