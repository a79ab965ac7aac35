"""How a run ends: signals become a request that all ranks agree on at the end of a step, and every end has its exit code."""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import socket
import sys
import threading
import traceback
from types import FrameType
from typing import Any


class ExitCode(enum.IntEnum):
    """What a scheduler reads. 70, 74 and 75 are those of BSD's sysexits.h, 124 is that of timeout(1), 130 a shell's."""

    FINISHED = 0  # also: reached stop_at
    USER = 1  # the message says what to change; the same command again ends the same way
    INTERNAL = 70  # a defect, a dead peer, or a hang that the watchdog ended
    STORAGE = 74  # checkpoints cannot be written
    STOPPED = 75  # by a signal, and saved: the same command goes on
    DEADLINE = 124  # by a signal, but not saved in time: the same command goes on from the checkpoint before
    INTERRUPTED = 130  # Ctrl-C a second time


class StopRequest:
    """Set by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 while the `with` block runs; read once a step.

    A second Ctrl-C stops at once. torchrun follows a Ctrl-C with a SIGTERM, which therefore counts as the same request.
    With `deadline_seconds` the process ends with ExitCode.DEADLINE when the block has not ended that long after the signal:
    from a thread that Python's C handler wakes, because the main thread may wait inside a collective and see no signal.
    Use it in the main thread, where Python delivers signals.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

    def __init__(self, deadline_seconds: float | None = None) -> None:
        self.reason: str | None = None
        self._before: dict[int, Any] = {}
        self._deadline_seconds = deadline_seconds
        self._ended = threading.Event()
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        if self._deadline_seconds is not None:
            self._start_clock(self._deadline_seconds)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._exits.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.reason == "SIGINT" and name == "SIGINT":
            raise KeyboardInterrupt
        if self.reason is None:
            self.reason = name
            print(
                f"\n{name}: finishing this step, then saving. Ctrl-C again stops at once.", file=sys.stderr, flush=True
            )

    def _start_clock(self, seconds: float) -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch_clock, args=(ours, seconds), name="deadline", daemon=True)
        self._exits.callback(ours.close)
        self._exits.callback(thread.join)
        self._exits.callback(theirs.close)  # wakes the thread
        self._exits.callback(signal.set_wakeup_fd, before)
        thread.start()

    def _watch_clock(self, woken: socket.socket, seconds: float) -> None:
        numbers = {int(number) for number in self.SIGNALS}
        while received := woken.recv(64):  # the numbers of the signals that came, one byte each
            if numbers & set(received):
                break
        if received and not self._ended.wait(seconds):
            print(
                f"error: not saved within checkpoint.deadline_seconds {seconds:g} of the signal; the checkpoint before this "
                "step stays the last",
                file=sys.stderr,
                flush=True,
            )
            os._exit(ExitCode.DEADLINE)


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row could not be used; the run stops before anything worse is saved."""


class StorageError(RuntimeError):
    """Checkpoints cannot be written; those that are there are intact."""


def is_for_the_user(error: BaseException) -> bool:
    """Whether an error is one of ours about input, complete in its message: raised by this project's own code.

    An error from inside a library may be a defect, and keeps its traceback.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return isinstance(error, (ValueError, OSError, RuntimeError, ImportError)) and raised_in.startswith("grist_")


def exit_for(error: Exception) -> SystemExit:
    """How the process ends after an error: says what a user has to know of it, and has the code that a scheduler reads."""
    if isinstance(error, StorageError):
        print(f"error: {error}", file=sys.stderr)
        return SystemExit(ExitCode.STORAGE)
    if is_for_the_user(error):
        return SystemExit(f"error: {error}")  # which Python prints, and makes status 1 of
    traceback.print_exception(error)
    return SystemExit(ExitCode.INTERNAL)
