"""Signals become requests; numbers that are not finite stop the run."""

from __future__ import annotations

import os
import signal

import pytest

from grist_train.guard import NonFiniteLossError, StopRequest, require_finite


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}
    with StopRequest() as request:
        yield request
    assert {number: signal.getsignal(number) for number in StopRequest.SIGNALS} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_request(stop, number):
    os.kill(os.getpid(), number)
    assert stop.reason == number.name


def test_second_interrupt_stops_at_once(stop):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_terminate_after_interrupt_is_the_same_request(stop):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "SIGINT"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_refused(bad):
    require_finite(3, 1.0, 2.0)
    with pytest.raises(NonFiniteLossError, match="step 3"):
        require_finite(3, bad, 1.0)
    with pytest.raises(NonFiniteLossError, match="step 3"):
        require_finite(3, 1.0, bad)
