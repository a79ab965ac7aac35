"""Medians of calls in turns: everybody gets the same treatment, and only the work is timed."""

from __future__ import annotations

import time

import pytest
import torch

from grist_tools.timing import FEWEST, ROUNDS, WARMUP, Call, Ceilings, alternate, ceilings, measure
from grist_tools.timing_short import captured, host_us, is_short


def test_a_median_needs_several_calls():
    calls = []
    timing = measure(lambda: calls.append(1), "cpu", budget_ms=0.0)
    assert timing.repetitions == FEWEST
    assert len(calls) == FEWEST + WARMUP + 1  # the warm-up is not among them, nor the first of a slice


def test_calls_take_turns_and_each_round_begins_with_another():
    order: list[str] = []
    found = alternate({name: Call(lambda name=name: order.append(name)) for name in "abc"}, "cpu", 0.0)
    assert found.keys() == set("abc")
    assert {timing.repetitions for timing in found.values()} == {FEWEST}
    turns = order[3 * WARMUP :]
    rounds = ["".join(turns[start : start + 6 : 2]) for start in range(0, len(turns), 6)]  # each slice calls twice
    assert rounds == ["abc", "bca", "cab", "abc", "bca"]
    assert len(rounds) == ROUNDS


def test_what_comes_before_is_run_each_time_and_not_timed():
    ran = []

    def before():
        time.sleep(0.005)
        ran.append("before")

    timing = alternate({"call": Call(lambda: ran.append("work"), before)}, "cpu", 0.0)["call"]
    assert timing.p80_ms < 2.5
    assert ran == ["before", "work"] * (len(ran) // 2)
    assert len(ran) // 2 > FEWEST


def test_a_longer_budget_gives_more_repetitions_within_bounds():
    few = measure(lambda: time.sleep(0.001), "cpu", budget_ms=10).repetitions
    many = measure(lambda: time.sleep(0.001), "cpu", budget_ms=60).repetitions
    assert FEWEST <= few < many <= 60


def test_ceilings_are_rates_of_this_device(monkeypatch):
    monkeypatch.setattr("grist_tools.timing.COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr("grist_tools.timing.MATMUL_ROWS", {"cpu": 64})
    found = ceilings("cpu", torch.float32)
    assert 1e8 < found.copy_bytes_per_second < 1e13
    assert 1e8 < found.matmul_flops_per_second < 1e14
    assert Ceilings(1.0, 4.0).higher(Ceilings(2.0, 3.0)) == Ceilings(2.0, 4.0)


def test_a_call_is_short_if_the_host_may_be_part_of_its_time():
    assert is_short(0.02, host=5.0)
    assert is_short(0.15, host=100.0)
    assert not is_short(0.15, host=20.0)


def _backward(x: torch.Tensor) -> tuple[Call, list[torch.Tensor]]:
    """d(x^3)/dx as a call with a forward before it, and the list that its last result lands in."""
    kept: list[torch.Tensor] = []
    found: list[torch.Tensor] = []

    def forward():
        kept[:] = [x**3]

    def work():
        found[:] = torch.autograd.grad(kept, [x], [torch.ones_like(x)])

    return Call(work, forward), found


@pytest.mark.gpu
def test_a_captured_backward_gives_the_gradient_again():
    x = torch.randn(1000, device="cuda", requires_grad=True)
    call, found = _backward(x)
    graph = captured(call)
    assert graph.before is not None
    with torch.no_grad():
        x.copy_(torch.arange(1000.0))
    graph.before()
    graph.work()
    torch.testing.assert_close(found[0], 3 * x.detach() ** 2)


@pytest.mark.gpu
def test_a_call_that_waits_is_not_captured_and_harms_nothing():
    x = torch.randn(1000, device="cuda", requires_grad=True)
    with pytest.raises(RuntimeError, match="synchroniz"):
        captured(Call(lambda: x.sum().item()))
    assert torch.cuda.get_sync_debug_mode() == 0
    captured(_backward(x)[0]).work()


@pytest.mark.gpu
def test_times_on_the_device():
    x = torch.randn(2**24, device="cuda")
    call = Call(lambda: x.mul(2))
    timing = alternate({"a": call, "b": call}, "cuda", 20)
    assert timing["a"].median_ms == pytest.approx(timing["b"].median_ms, rel=0.2)
    assert 0 < host_us(call) < 1e4
