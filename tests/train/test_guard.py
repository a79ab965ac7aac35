"""Signals become requests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_run import ROOT, environment

from grist_train.guard import ExitCode, NonFiniteLossError, StopRequest, StorageError, exit_for, is_for_the_user


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


def raised(source: str, module: str) -> Exception:
    """The exception of a line that stands in this module."""
    try:
        exec(compile(source, "<test>", "exec"), {"__name__": module, "NonFiniteLossError": NonFiniteLossError})
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_errors_of_this_project_are_for_the_user_and_others_keep_their_traceback():
    for kind in ("ValueError", "FileNotFoundError", "RuntimeError", "ImportError"):
        assert is_for_the_user(raised(f"raise {kind}('what to do')", "grist_train.trackers")), kind
        assert not is_for_the_user(raised(f"raise {kind}('inside')", "torch.nn")), kind
    assert not is_for_the_user(raised("raise KeyError('a defect')", "grist_train.trackers"))


def test_every_end_has_its_code(capsys):
    assert exit_for(StorageError("no room")).code == ExitCode.STORAGE
    assert capsys.readouterr().err == "error: no room\n"
    assert exit_for(raised("raise KeyError('a defect')", "grist_train.trackers")).code == ExitCode.INTERNAL
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert "KeyError: 'a defect'" in said
    ours = raised("raise NonFiniteLossError('a lower rate')", "grist_train.bad_steps")
    assert exit_for(ours).code == "error: a lower rate"  # which Python prints, with status 1


WAITS = """
import os, signal, sys, threading, time
from grist_train.guard import StopRequest
with StopRequest(deadline_seconds=float(sys.argv[1])) as stop:
    print("ready", flush=True)
    {wait}
print("saved" if stop.reason else "no signal")
"""
# A call into C that does not return, as in a collective whose peer is gone: Python's handlers wait until it does.
IN_C = "import ctypes; [ctypes.CDLL(None).pause() for _ in iter(int, 1)]"


def signalled(wait: str, deadline_seconds: float) -> tuple[int, str, float]:
    """(exit code, what it said, seconds) of a process that gets SIGTERM while it waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(wait=wait), str(deadline_seconds)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    return process.returncode, said, time.monotonic() - began


def test_what_takes_longer_than_the_deadline_is_given_up():
    code, said, seconds = signalled("while True: time.sleep(0.01)", 0.3)
    assert code == ExitCode.DEADLINE
    assert "not saved within checkpoint.deadline_seconds 0.3" in said
    assert seconds >= 0.3


def test_the_deadline_holds_where_the_main_thread_sees_no_signal():
    code, said, _ = signalled(IN_C, 0.3)
    assert code == ExitCode.DEADLINE
    assert "not saved within" in said


def test_what_is_done_in_time_ends_as_it_would_without():
    code, said, seconds = signalled("while stop.reason is None: time.sleep(0.01)", 30.0)
    assert code == 0
    assert said.endswith("saved\n")
    assert seconds < 20


def test_without_a_signal_there_is_no_deadline():
    with StopRequest(deadline_seconds=0.05) as request:
        time.sleep(0.2)
    assert request.reason is None
    assert signal.set_wakeup_fd(-1) == -1, "the descriptor that was closed is no longer written to"


@pytest.mark.parametrize(("ends", "code"), [("sys.exit(75)", 75), ("os.kill(os.getpid(), 9)", 70), ("pass", 0)])
def test_the_launcher_ends_as_its_workers_did(tmp_path, ends, code):
    (tmp_path / "worker.py").write_text(f"import os, sys\n{ends}\n")
    launcher = [sys.executable, str(ROOT / "train/launch/torchrun.py"), "--standalone", "--nproc-per-node=1"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "worker.py")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
