"""The benchmark of quantized generation: a run of it on a tiny model, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from grist_tools import bench_generation_quantized as bench

pytest.importorskip("transformers")

SHAPE = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 320}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "_SHAPE", SHAPE)


def test_contestants_take_turns_and_the_figures_are_written(tiny, tmp_path, capsys):
    names = ["float32", "bfloat16", "int8", "int4", "transformers"]
    try:
        import xllamacpp  # noqa: F401  # pyright: ignore[reportMissingImports]

        names.append("llama.cpp-q8_0")
    except ImportError:
        pass
    out = tmp_path / "figures.json"
    sizes = ["--prompt", "4", "--new", "3", "--repetitions", "1", "--patience", "0"]
    assert bench.main(["--contestants", ",".join(names), *sizes, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    who = {row["who"] for row in report["rows"]}
    assert len(who) == len(names)
    bytes_of = {row["who"]: row["weights_bytes"] for row in report["rows"]}
    packed = [bytes_of[f"{bench.OURS} {name}"] for name in ("int4", "int8", "bfloat16", "float32")]
    assert packed == sorted(packed)
    assert len(set(packed)) == 4
    judged = {row["who"] for row in report["rows"] if "reached" in row}
    assert judged == {f"{bench.OURS} int8", f"{bench.OURS} int4"}
    assert f"{bench.OURS} int4" in capsys.readouterr().out


def test_packed_weights_that_compute_something_else_are_refused(tmp_path, monkeypatch):
    bench.source_model(tmp_path / "source", 16, SHAPE)
    bench.quantized_directory(tmp_path / "source", tmp_path / "int8", "int8")
    bench.check_packed(tmp_path / "int8", SHAPE["vocab_size"])

    from grist_kernels.quantized import Int8Weight

    whole = Int8Weight.dequantise
    monkeypatch.setattr(Int8Weight, "dequantise", lambda self, dtype=torch.float32: 1.01 * whole(self, dtype))
    with pytest.raises(ValueError, match="int8: logits of packed weights are off"):
        bench.check_packed(tmp_path / "int8", SHAPE["vocab_size"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contestants", "bfloat16,int5"], "has int5"),
        (["--contestants", "int8"], "must have bfloat16"),
        (["--new", "0"], "--new must be at least 1"),
    ],
)
def test_what_makes_no_benchmark_is_refused(options, message, capsys):
    assert bench.main(options) == 2
    assert message in capsys.readouterr().err
