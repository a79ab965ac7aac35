"""Signals become requests."""

from __future__ import annotations

import os
import signal

import pytest

from grist_train.guard import StopRequest, is_for_the_user


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


def test_errors_of_this_project_are_for_the_user_and_others_keep_their_traceback():
    def raised(source: str, module: str) -> Exception:
        try:
            exec(compile(source, "<test>", "exec"), {"__name__": module})
        except Exception as error:
            return error
        raise AssertionError("nothing was raised")

    for kind in ("ValueError", "FileNotFoundError", "RuntimeError", "ImportError"):
        assert is_for_the_user(raised(f"raise {kind}('what to do')", "grist_train.trackers")), kind
        assert not is_for_the_user(raised(f"raise {kind}('inside')", "torch.nn")), kind
    assert not is_for_the_user(raised("raise KeyError('a defect')", "grist_train.trackers"))
