"""Signals become requests."""

from __future__ import annotations

import os
import signal

import pytest

from grist_train.guard import StopRequest


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
