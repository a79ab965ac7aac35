"""One thread that makes things before they are asked for."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any


class RunAhead:
    """Calls `make` again and again, at most `depth` results ahead of `take`.

    make must not refer to what owns this object, or the owner is never collected.
    """

    def __init__(self, make: Callable[[], Any], depth: int) -> None:
        self._make, self._depth = make, depth
        self._made: deque[Any] = deque()
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._pid = os.getpid()
        # A daemon: at exit Python joins other threads before it runs what would stop this one.
        self._thread = threading.Thread(target=self._run, name="gristmill-batches", daemon=True)
        self._thread.start()

    @property
    def is_here(self) -> bool:
        """False in a process that was forked off: threads stay behind, and locks may be held by them for ever."""
        return self._pid == os.getpid()

    def take(self) -> Any:
        """The next result. Raises what `make` raised, in its turn, after the results before it."""
        with self._changed:
            while not self._made and self._error is None:
                self._changed.wait()
            if not self._made:
                assert self._error is not None, "waited for one of the two"
                raise self._error
            self._changed.notify_all()
            return self._made.popleft()

    def stop(self) -> None:
        """Wait for the call of `make` that is under way, and end."""
        if not self.is_here:
            return
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # garbage may be collected in any thread
            self._thread.join()

    def _run(self) -> None:
        while self._has_room():
            try:
                made = self._make()
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._made.append(made)
                self._changed.notify_all()

    def _has_room(self) -> bool:
        """Wait for room; False when there is no need of more."""
        with self._changed:
            while len(self._made) >= self._depth and not self._stopped:
                self._changed.wait()
            return not self._stopped
