"""Stopping without losing work: signals become a request that all ranks agree on at the end of a step."""

from __future__ import annotations

import signal
import sys
import traceback
from types import FrameType
from typing import Any


class StopRequest:
    """Set by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 while the `with` block runs; read once a step.

    A second Ctrl-C stops at once. torchrun follows a Ctrl-C with a SIGTERM, which therefore counts as the same request.
    Use it in the main thread, where Python delivers signals.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
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


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row could not be used; the run stops before anything worse is saved."""


def is_for_the_user(error: BaseException) -> bool:
    """Whether an error is one of ours about input, complete in its message: raised by this project's own code.

    An error from inside a library may be a defect, and keeps its traceback.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return isinstance(error, (ValueError, OSError, RuntimeError, ImportError)) and raised_in.startswith("grist_")
