"""What a step costs and how its gradients are made up: in every row of a run, on one process and on two."""

from __future__ import annotations

import json
import math

import pytest
import tiny_run


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_have_times_memory_and_norms_and_the_profile_is_written(tmp_path, processes):
    changes = {
        "steps": 6,
        "checkpoint": {"every": 3},
        "evaluate": {"every": 3},
        "logging": {"grad_norm_by_layer": True},
    }
    config = tiny_run.write_run(tmp_path, **changes)
    done = tiny_run.train(config, "--profile.steps", "[2,3]", processes=processes)
    rows = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert len(rows) == 6
    for row in rows:
        assert {f"time_{part}_ms" for part in "data ranks forward backward optimizer other".split()} <= set(row)
        assert 0.05 < row["memory_resident_gib"] < 64
        kinds = [value for key, value in row.items() if key.startswith("grad_norm/")]
        assert math.hypot(*kinds) == pytest.approx(row["grad_norm"], rel=1e-5)
        assert len(row["grad_norm_by_layer"]) == 2
    assert [row["step"] for row in rows if "time_checkpoint_ms" in row] == [4]
    assert [row["step"] for row in rows if "time_profile_ms" in row] == [4]
    passed_ms = 1e3 * (rows[2]["seconds"] - rows[0]["seconds"])
    spent_ms = sum(value for row in rows[1:3] for key, value in row.items() if key.startswith("time_"))
    assert spent_ms == pytest.approx(passed_ms, rel=0.05, abs=5)
    assert "a step took " in done.stderr
    written = {path.name for path in (tmp_path / "runs/tiny/profile").glob("*.gz")}
    assert written == {f"steps-2-3-rank-{rank}.json.gz" for rank in range(processes)}
