"""Profiles: what is written, and that the words are true."""

from __future__ import annotations

import gzip
import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from grist_train.distributed import World
from grist_train.logging_config import LoggingConfig, ProfileConfig, check_logging
from grist_train.profiling import Cost, Costs, StepProfiler, costs, covered, report, summed
from grist_train.step_timer import StepTimer


def world(device: str = "cpu") -> World:
    return World(0, 1, 0, torch.device(device), None, None)  # pyright: ignore[reportArgumentType]


def run_steps(profiler: StepProfiler, steps: range, device: str = "cpu") -> list[str]:
    timer, told = StepTimer(torch.device(device)), []
    a = torch.rand(256, 256, device=device)
    for step in steps:
        profiler.begin(step)
        time.sleep(0.03)
        timer.mark("data")
        (a @ a).sum().item()
        timer.mark("forward")
        if profiler.end(step, timer.lap()):
            told.append(profiler.write())
    return told


def check_folder(folder, device: str) -> str:
    profiler = StepProfiler(ProfileConfig((2, 3), memory=True), folder / "profile", world(device))
    (told,) = run_steps(profiler, range(1, 6), device)
    assert not profiler.has_something
    trace = json.loads(gzip.decompress((folder / "profile" / "steps-2-3-rank-0.json.gz").read_bytes()))
    products = [event for event in trace["traceEvents"] if event.get("name") == "aten::mm"]
    assert len(products) == 2  # of five steps, two
    assert told.endswith((folder / "profile" / "steps-2-3-rank-0.txt").read_text().rstrip())
    return told


def test_the_chosen_steps_are_in_the_trace_and_the_costs_in_words(tmp_path):
    told = check_folder(tmp_path, "cpu")
    first, waits, largest, _, *table = told.splitlines()[1:]
    assert first.startswith("a step took ")
    assert first.split(": ")[1].startswith("data ")  # the largest part stands first
    assert float(waits.split("%")[0]) > 50
    assert largest.startswith("the largest operation: ")
    shares = [float(line.split("%")[0]) for line in table]
    assert shares == sorted(shares, reverse=True)
    assert any(line.endswith("  aten::mm") and line.split()[2] == "1.0" for line in table)
    assert sorted(path.suffix for path in (tmp_path / "profile").iterdir()) == [".gz", ".txt"]


@pytest.mark.gpu
def test_on_a_device_kernels_are_told_and_memory_is_drawn(tmp_path):
    told = check_folder(tmp_path, "cuda")
    assert "the device is busy " in told
    assert "the largest kernel: " in told
    assert (tmp_path / "profile" / "steps-2-3-rank-0-memory.pickle").stat().st_size > 0


def test_a_run_that_ends_among_the_steps_keeps_what_there_is(tmp_path):
    profiler = StepProfiler(ProfileConfig((2, 9)), tmp_path, world())
    assert run_steps(profiler, range(1, 4)) == []
    assert profiler.has_something
    assert "steps-2-3-rank-0.json.gz" in profiler.write()
    assert (tmp_path / "steps-2-3-rank-0.json.gz").is_file()


@pytest.mark.parametrize(("config", "steps"), [(None, range(1, 4)), (ProfileConfig((2, 3)), range(4, 6))])
def test_what_is_not_asked_for_leaves_nothing(tmp_path, config, steps):
    profiler = StepProfiler(config, tmp_path / "profile", world())
    assert run_steps(profiler, steps) == []
    assert not profiler.has_something
    assert not (tmp_path / "profile").exists()


def event(name: str, start: float, end: float, on_device: bool, note: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CUDA if on_device else DeviceType.CPU,
        is_user_annotation=note,
        self_device_time_total=end - start,
        self_cpu_time_total=end - start,
        time_range=SimpleNamespace(start=start, end=end),
    )


def test_costs_of_a_device_are_its_kernels():
    """Two streams: 0 to 3 and 2 to 5 ms, then 8 to 9; what the host did, and notes over kernels, do not count."""
    events = [
        event("matmul", 0, 3000, True),
        event("ncclKernel", 2000, 5000, True),
        event("matmul", 8000, 9000, True),
        event("a note", 0, 9000, True, note=True),
        event("aten::mm", 0, 9000, False),
    ]
    found = costs(events, on_cuda=True)  # pyright: ignore[reportArgumentType]
    assert found == Costs([Cost("matmul", 4.0, 2), Cost("ncclKernel", 3.0, 1)], 6.0)
    assert costs(events, on_cuda=False) == Costs([Cost("aten::mm", 9.0, 1)], None)  # pyright: ignore[reportArgumentType]
    told = report(found, {"data": 1.0, "forward": 9.0}, 2, on_cuda=True).splitlines()
    assert told[:5] == [
        "a step took 5.0 ms: forward 90.0%, data 10.0%",
        "10.0% of it waits for data",
        "the device is busy 60.0% of it",
        "communication runs 30.0% of it, beside computation as far as it can",
        "the largest kernel: matmul, 40.0%, 1 calls a step",
    ]


def test_intervals_are_covered_once():
    assert covered([]) == 0
    assert covered([(5, 6), (0, 4), (1, 2), (3, 5.5)]) == 6
    assert covered([(0, 1), (2, 3)]) == 2


def test_parts_of_steps_add_up():
    assert summed([{"data": 1.0, "forward": 2.0}, {"data": 0.5, "checkpoint": 3.0}]) == {
        "data": 1.5,
        "forward": 2.0,
        "checkpoint": 3.0,
    }


@pytest.mark.parametrize("steps", [(0, 3), (5, 4), (9, 11)])
def test_steps_that_cannot_be_meant_are_refused(steps):
    with pytest.raises(ValueError, match=r"profile.steps must be \[first, last\] with 1 <= first <= last <= steps, 10"):
        check_logging(LoggingConfig(), ProfileConfig(steps), 10)


def test_a_project_without_a_name_is_refused():
    with pytest.raises(ValueError, match=r"logging.wandb is the name of a project"):
        check_logging(LoggingConfig(wandb=""), None, 10)
