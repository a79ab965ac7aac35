"""What loading adds to a process's memory, measured small."""

from __future__ import annotations

import json

import pytest

import grist_model
from grist_model import accounting
from grist_model.weight_reading import _AT_ONCE_BYTES
from grist_tools import bench_load
from grist_tools.bench_load import FAMILIES, config_of_size, main, measured
from grist_tools.bench_load_process import RESET

linux = pytest.mark.skipif(not RESET.exists(), reason="peaks of memory are measured on Linux")


@pytest.mark.parametrize("family", FAMILIES)
def test_models_have_the_size_that_is_asked_for(family):
    config = config_of_size(family, 2e8, 4)
    assert 2e8 <= 4 * accounting.parameters(config) < 4e8
    assert config.to_hf()["model_type"] == family


@linux
def test_a_model_is_not_held_twice(tmp_path):
    """Mapping the file and copying out of it would make it twice; a piece of it at a time is what may come on top."""
    model = grist_model.build(config_of_size("llama", 2e8, 4), device="meta").to_empty(device="cpu")
    grist_model.save(model, tmp_path / "model")
    (found,) = measured("load", tmp_path / "model", "stored", 1)
    assert found["held_bytes"] >= 2e8
    assert 0.9 * found["held_bytes"] < found["peak_bytes"] < 1.1 * found["held_bytes"] + _AT_ONCE_BYTES


@linux
def test_two_ranks_hold_a_half_each(model_directory):
    whole = sum(tensor.nbytes for tensor in grist_model.load(model_directory).state_dict().values())
    found = measured("load_into", model_directory, "float32", 2)
    assert sum(each["held_bytes"] for each in found) == pytest.approx(whole, rel=0.05)


def test_the_report_names_what_was_over(monkeypatch, tmp_path, capsys, model_directory):
    monkeypatch.setattr("grist_tools.bench_kernels.commit", lambda: "abc")

    def stand_in(how, directory, dtype, ranks):
        peak = 130 if how == "load_into" and ranks == 2 else 110
        return [{"held_bytes": 100, "peak_bytes": peak, "peak_of_held": peak / 100, "seconds": 0.5}] * ranks

    monkeypatch.setattr(bench_load, "measured", stand_in)
    out = tmp_path / "load.json"
    assert main(["--directory", str(model_directory), "--out", str(out), "--repetitions", "1"]) == 1
    report = json.loads(out.read_text())
    assert (report["what"], report["commit"], report["complete"]) == ("load", "abc", True)
    assert [row["ok"] for row in report["rows"]] == [True, True, True, True, False]
    assert "1.30 !" in capsys.readouterr().out


def test_a_process_that_fails_is_told(tmp_path):
    with pytest.raises(RuntimeError, match=r"config\.json does not exist"):
        measured("load", tmp_path, "stored", 1)
