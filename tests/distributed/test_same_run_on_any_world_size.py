"""One process and two compute the same run: the same losses, stop and resume across world sizes included.

float32, 30 steps, to 1e-5 relative: sums over ranks may round differently, nothing else may differ.
"""

from __future__ import annotations

import pytest
from tiny_run import losses, train, write_run

STEPS = 30


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train(write_run(folder, steps=STEPS, checkpoint={"every": 0}, evaluate={"every": 0}), "--batch.micro_size", "4")
    return losses(folder)


def assert_same(got: dict[int, float], want: dict[int, float]) -> None:
    assert sorted(got) == sorted(want) == list(range(1, STEPS + 1))
    worst = max(abs(got[s] - want[s]) / want[s] for s in want)
    assert worst < 1e-5, f"losses differ by {worst:.2e} relative"
    assert want[STEPS] < want[1] - 0.2, "the run must learn, or equal losses would prove nothing"


def test_two_processes_equal_one(reference, tmp_path):
    train(write_run(tmp_path, steps=STEPS, checkpoint={"every": 0}, evaluate={"every": 0}), processes=2)
    assert_same(losses(tmp_path), reference)


def test_whole_batch_at_once_equals_two_processes(reference, tmp_path):
    """Sums over 8 sequences instead of 4 and 4 round differently, and nothing else differs."""
    train(write_run(tmp_path, steps=STEPS, checkpoint={"every": 0}, evaluate={"every": 0}), "--batch.micro_size", "8")
    assert_same(losses(tmp_path), reference)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_resume_on_the_other_world_size(reference, tmp_path, first, second):
    run = write_run(tmp_path, steps=STEPS, checkpoint={"every": 0}, evaluate={"every": 0})
    stopped = train(run, "--stop_at", "15", processes=first)
    assert "saved step 15" in stopped.stderr
    assert max(losses(tmp_path)) == 15
    resumed = train(run, processes=second)
    assert "resuming at step 15" in resumed.stderr
    assert_same(losses(tmp_path), reference)
