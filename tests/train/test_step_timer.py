"""The time of a step, cut into parts: nothing lost, nothing twice."""

from __future__ import annotations

import time

import pytest
import torch

from grist_train.memory_peak import memory_peak
from grist_train.step_timer import StepTimer

CPU = torch.device("cpu")


def test_parts_add_up_to_the_time_that_passed():
    began = time.perf_counter()
    timer = StepTimer(CPU)
    laps = []
    for _ in range(2):
        for _ in range(2):
            time.sleep(0.01)
            timer.mark("forward")
            time.sleep(0.02)
            timer.mark("backward")
        laps.append(timer.lap())
    passed_ms = (time.perf_counter() - began) * 1e3
    times = [lap.milliseconds() for lap in laps]
    assert [list(each) for each in times] == [["forward", "backward", "other"]] * 2
    assert sum(sum(each.values()) for each in times) == pytest.approx(passed_ms, abs=1.0)
    assert all(each["forward"] >= 20 and each["backward"] >= 40 for each in times)


def test_what_comes_between_two_steps_is_in_the_later_one():
    timer = StepTimer(CPU)
    timer.mark("data")
    first = timer.lap()
    time.sleep(0.02)
    timer.mark("checkpoint")
    second = timer.lap()
    assert "checkpoint" not in first.milliseconds()
    assert second.milliseconds()["checkpoint"] >= 20


def test_a_row_names_part_and_unit():
    timer = StepTimer(CPU)
    timer.mark("data")
    assert list(timer.lap().row()) == ["time_data_ms", "time_other_ms"]


@pytest.mark.gpu
def test_events_measure_what_the_device_did():
    """Work that is queued at once and done later counts where it was done; so does what the device waited for the host."""
    device = torch.device("cuda", 0)
    a = torch.rand(4096, 4096, device=device)
    (a @ a).sum().item()
    timer = StepTimer(device)
    time.sleep(0.05)
    timer.mark("data")
    began = time.perf_counter()
    for _ in range(20):
        a = a @ a * 1e-4
    queued_ms = (time.perf_counter() - began) * 1e3
    timer.mark("forward")
    times = timer.lap().milliseconds()
    assert times["data"] >= 49
    assert times["forward"] > queued_ms


def test_memory_of_the_process_is_above_what_it_holds():
    held = torch.ones(64 * 2**20, dtype=torch.uint8)  # 1/16 GiB, touched
    peak = memory_peak(CPU)
    assert list(peak) == ["memory_resident_gib"]
    assert held.numel() / 2**30 < peak["memory_resident_gib"] < 64


@pytest.mark.gpu
def test_memory_of_a_device_begins_anew_with_every_call():
    device = torch.device("cuda", 0)
    memory_peak(device)
    large = torch.empty(2**28, dtype=torch.uint8, device=device)
    del large
    first, second = memory_peak(device), memory_peak(device)
    assert first["memory_allocated_gib"] >= 0.25
    assert second["memory_allocated_gib"] < 0.25 <= second["memory_reserved_gib"]
