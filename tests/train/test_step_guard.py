from __future__ import annotations

import math
import random

import pytest
import tiny_house
import torch

from grist_train import optimizer
from grist_train.config import OptimizerConfig
from grist_train.guard_config import GuardConfig, check_guard
from grist_train.step_guard import StepGuard, arm

NAN, INF = float("nan"), float("inf")


def judged(guard: StepGuard, losses: list[float], norm: float = 1.0) -> list[bool]:
    return [bool(guard.judge(torch.tensor(loss), torch.tensor(norm))) for loss in losses]


def noise(n: int, level: float = 3.0, spread: float = 0.05, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(level, spread) for _ in range(n)]


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (1.0, NAN), (1.0, INF), (NAN, NAN)])
@pytest.mark.parametrize("factor", [None, 6.0])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(loss, norm, factor):
    guard = StepGuard(GuardConfig(factor), "cpu")
    assert judged(guard, [loss], norm) == [True]
    assert judged(guard, [3.0]) == [False]
    assert guard.state_dict() == {"accepted_losses": [3.0]}


def test_a_spike_is_skipped_and_leaves_no_trace():
    clean, struck = (StepGuard(GuardConfig(8.0, spike_window=32), "cpu") for _ in range(2))
    before, after = noise(40), noise(40, seed=1)
    assert not any(judged(clean, before + after))
    assert not any(judged(struck, before))
    assert judged(struck, [9.0, NAN, 9.5, INF]) == [True] * 4
    assert not any(judged(struck, after))
    assert struck.state_dict() == clean.state_dict()


def test_no_spike_before_half_of_the_window_is_there():
    guard = StepGuard(GuardConfig(6.0, spike_window=16), "cpu")
    assert not any(judged(guard, noise(7)))
    assert judged(guard, [50.0]) == [False]
    assert judged(guard, [51.0]) == [True]


def test_a_falling_loss_is_no_spike_and_none_factor_finds_none():
    guard = StepGuard(GuardConfig(6.0, spike_window=16), "cpu")
    assert not any(judged(guard, [10 * math.exp(-i / 20) for i in range(100)]))
    assert not any(judged(StepGuard(GuardConfig(None), "cpu"), [*noise(200), 1e6]))


def test_equal_losses_are_no_spikes_of_each_other():
    guard = StepGuard(GuardConfig(6.0, spike_window=8), "cpu")
    assert not any(judged(guard, [2.0] * 20))
    assert judged(guard, [2.0000002, 2.1]) == [False, True]


@pytest.mark.parametrize("n", [3, 8, 21])
def test_a_guard_goes_on_from_its_state(n):
    config = GuardConfig(5.0, spike_window=8)
    whole = StepGuard(config, "cpu")
    judged(whole, noise(n))
    again = StepGuard(config, "cpu", whole.state_dict())
    rest = [*noise(5, seed=3), 4.0, NAN, *noise(9, seed=4)]
    assert judged(again, rest) == judged(whole, rest)
    assert again.state_dict() == whole.state_dict()


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ()], ids=["on the device", "on the host"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_changes_neither_weights_nor_averages(name, devices, monkeypatch):
    monkeypatch.setattr("grist_train.step_guard.DECIDING_DEVICES", devices)

    def two(skip_second: bool):
        torch.manual_seed(0)
        model = tiny_house.model()
        optimizers = optimizer.build(model, OptimizerConfig(name=name, weight_decay=0.1))
        for step in range(3):
            if step == 1 and not skip_second:
                continue
            for p in model.parameters():
                p.grad = torch.full_like(p, NAN) if step == 1 else torch.full_like(p, 0.1 + 0.1 * step)
                p.grad += torch.arange(p.numel()).view_as(p) % 7 * 0.01
            for each in optimizers:
                arm([each], torch.tensor(step == 1))
                each.step()
        states = [each.state_dict()["state"] for each in optimizers]
        return dict(model.named_parameters()), states

    (weights, states), (want, want_states) = two(True), two(False)
    for key, value in weights.items():
        assert torch.equal(value, want[key]), key
    flat, flat_want = (
        [value for state in each for of_parameter in state.values() for value in of_parameter.values()]
        for each in (states, want_states)
    )
    assert len(flat) == len(flat_want) > 0
    assert all(torch.equal(one, other) for one, other in zip(flat, flat_want, strict=True))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GuardConfig(spike_factor=0.0), "spike_factor must be above 0"),
        (GuardConfig(spike_window=4), "spike_window must be at least 8"),
        (GuardConfig(patience=-1), "patience must be at least 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        check_guard(config)
