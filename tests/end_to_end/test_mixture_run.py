"""Runs over several datasets in stages, and the same samples once each however ranks and batch sizes change on the way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash
import yaml
from tiny_run import losses, train, write_run, write_text

from grist_data import Batches, Shards
from grist_data.mixture import Mixture, Stage

SOURCES = ("grain", "bread")
STAGES = [
    {"after_step": 3, "weights": {"grain": 0.25, "bread": 0.75}, "sequence_length": 16, "global_size": 12},
    {"after_step": 6, "sequence_length": 32},
]


def _write_mixture(folder: Path, **changes) -> Path:
    run = yaml.safe_load(write_run(folder, **changes).read_text())
    directories = {name: str(folder / name) for name in SOURCES}
    for seed, name in enumerate(SOURCES):
        write_text(folder / f"{name}.jsonl", seed=seed, documents=30)
    prepares = {
        "grain": {"vocab_size": 300, "val_fraction": 0.2},
        "bread": {"tokenizer": directories["grain"], "val_fraction": 0.2},
    }
    run["data"] = {
        "sources": {
            name: {
                "directory": directories[name],
                "weight": weight,
                "prepare": {"source": "files", "paths": [str(folder / f"{name}.jsonl")], **prepares[name]},
            }
            for name, weight in zip(SOURCES, (1.0, 0.0), strict=True)
        },
        "stages": STAGES,
        "sequence_length": 32,
        "log_samples": True,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


def _seen(folder: Path) -> dict[int, dict]:
    """Rows of all ranks, as position -> sample."""
    found = {}
    for path in sorted((folder / "runs/tiny/samples_seen").glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            for k, sample in enumerate(row["samples"]):
                assert row["position"] + k not in found, "a position of the run was trained on twice"
                found[row["position"] + k] = {"step": row["step"], "sample": sample}
    return found


def test_a_mixture_in_stages_trains_and_goes_on_as_if_never_stopped(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        run = _write_mixture(folder, steps=9, checkpoint={"every": 0}, evaluate={"every": 4})
        if folder is whole:
            train(run)
        else:
            train(run, "--stop_at", "5")
            train(run, processes=2)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)  # sums of two ranks round otherwise
    seen, again = _seen(whole), _seen(parts)
    assert again == seen
    assert sorted(seen) == list(range(3 * 8 + 6 * 12))
    sources = {step: {row["sample"][0] for row in seen.values() if row["step"] == step} for step in (3, 4)}
    assert sources == {3: {"grain"}, 4: {"grain", "bread"}}

    rows = [json.loads(line) for line in (whole / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    tokens = {row["step"]: row["tokens"] for row in rows if "loss" in row}
    assert tokens == {step: _tokens_until(step) for step in range(1, 10)}
    evaluated = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in evaluated] == [4, 8, 9]
    assert all({f"validation_bits_per_byte/{name}" for name in SOURCES} <= row.keys() for row in evaluated)
    report = json.loads((whole / "runs/tiny/evaluation.json").read_text())
    assert report["bytes"] == sum(each["bytes"] for each in report["sources"].values())
    worst, best = (pick(each["bits_per_byte"] for each in report["sources"].values()) for pick in (max, min))
    assert best <= report["bits_per_byte"] <= worst

    # What arrived is what the order of the library says.
    mixture = Mixture(
        {name: Shards.open(whole / name) for name in SOURCES},
        {"grain": 1.0},
        (Stage(24, {"grain": 0.25, "bread": 0.75}, 16, 12), Stage(24 + 36, sequence_length=32)),
    )
    batches, position = Batches(mixture, 32, 8, seed=0), 0
    for _ in range(9):
        (batch,) = next(batches)
        for row in batch.ids_BT.numpy():
            assert seen[position]["sample"][4] == xxhash.xxh3_64_hexdigest(row.tobytes())
            position += 1


def _tokens_until(step: int) -> int:
    return sum(8 * 32 if k < 3 else 12 * 16 if k < 6 else 12 * 32 for k in range(step))


def test_ranks_2_1_4_and_batch_8_to_24_within_an_epoch_see_every_sample_once(tmp_path):
    run = write_run(tmp_path, steps=100, data={"log_samples": True}, checkpoint={"every": 0}, evaluate={"every": 0})
    for stop, ranks, batch in ((4, 2, 8), (7, 1, 8), (9, 1, 24), (11, 4, 24)):
        train(run, "--stop_at", str(stop), "--batch.global_size", str(batch), processes=ranks)
    seen = _seen(tmp_path)
    n_samples = 7 * 8 + 4 * 24
    assert sorted(seen) == list(range(n_samples))
    windows = [tuple(row["sample"][1:3]) for row in seen.values()]
    shards = Shards.open(tmp_path / "dataset")
    per_epoch = Batches(shards, 32, 8, seed=0).samples_per_epoch
    assert per_epoch > 7 * 8, "the batch is to change within the first epoch"
    assert len(set(windows)) == n_samples
    in_first = {window for epoch, window in windows if epoch == 0}
    assert len(in_first) == min(n_samples, per_epoch)
    order = Batches(shards, 32, 1, seed=0)
    for position in range(n_samples):
        ((row,),) = [np.asarray(batch.ids_BT) for batch in next(order)]
        assert seen[position]["sample"][4] == xxhash.xxh3_64_hexdigest(row.tobytes())


def test_stages_that_have_begun_may_not_change(tmp_path):
    run = _write_mixture(tmp_path, steps=9, checkpoint={"every": 0}, evaluate={"every": 0})
    train(run, "--stop_at", "5")
    text = yaml.safe_load(run.read_text())
    text["data"]["stages"] = [STAGES[1]]
    run.write_text(yaml.safe_dump(text, sort_keys=False))
    again = train(run, check=False)
    assert again.returncode == 1
    assert "what is behind a run may not change" in again.stderr
    text["data"]["stages"] = [STAGES[0], {"after_step": 7, "weights": {"bread": 1.0}}]  # what lies ahead may
    run.write_text(yaml.safe_dump(text, sort_keys=False))
    train(run, "--stop_at", "8")
    assert {row["sample"][0] for row in _seen(tmp_path).values() if row["step"] == 8} == {"bread"}


def test_whole_documents_in_rows(tmp_path):
    """`data.packing`: rows of whole documents, stopped, and gone on with on two ranks."""
    run = write_run(
        tmp_path,
        steps=6,
        data={"packing": "best-fit", "log_samples": True},
        checkpoint={"every": 0},
        evaluate={"every": 0},
    )
    train(run, "--stop_at", "3")
    train(run, processes=2)
    seen = _seen(tmp_path)
    assert sorted(seen) == list(range(6 * 8))
    batches, position = Batches(Shards.open(tmp_path / "dataset"), 32, 8, seed=0, packing="best-fit"), 0
    for _ in range(6):
        (batch,) = next(batches)
        for row in batch.ids_BT.numpy():
            assert seen[position]["sample"][4] == xxhash.xxh3_64_hexdigest(row.tobytes())
            position += 1
    assert losses(tmp_path)[6] < losses(tmp_path)[1]
