"""Processes that do the tasks of a preparation on this machine.

They are fresh interpreters (`grist_data.worker`), spoken to through pipes in lines of JSON: nothing is forked with threads
running, and a caller's script is not imported again, as `multiprocessing` would. They share the lock of the directory, so
that no other preparation begins while one of them still writes; when the pipe closes they end.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from grist_data.atomic import PART_SUFFIX
from grist_data.manifest import WORK_DIRECTORIES
from grist_data.preparation import Preparation, Task, describe
from grist_data.prepare_config import PrepareConfig
from grist_data.sources import SOURCES

# Below this much text, starting processes takes longer than they save.
_WORTH_BYTES = 1 << 24


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """A context. Tasks run in this process where that is quicker or asked for.

    lock: the open file that holds the directory's lock.
    """

    def __init__(self, preparation: Preparation, lock: BinaryIO | None = None) -> None:
        self._preparation, self._lock = preparation, lock
        self._config = preparation.config
        self._processes: list[_Process] = []
        self._events: queue.SimpleQueue[tuple[_Process, dict[str, Any] | None]] = queue.SimpleQueue()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for process in self._processes:
            process.end(at_once=kind is not None)
        if kind is not None and self._processes:
            for name in WORK_DIRECTORIES:
                for unfinished in (self._preparation.out / name).glob(f"*{PART_SUFFIX}"):
                    unfinished.unlink(missing_ok=True)

    def number(self, text_bytes: int) -> int:
        """How many processes work on so much text; 1 is this one alone."""
        if not sys.executable or _home(self._config.source) is None:
            return 1
        return self._config.workers or (cores() if text_bytes >= _WORTH_BYTES else 1)

    def run(self, tasks: Iterable[Task], number: int) -> Iterator[dict[str, Any]]:
        """Do the tasks and yield what is done, in any order.

        Raises what a task raised, with the task named, and ChildProcessError when a process was killed.
        """
        waiting = collections.deque(tasks)
        if number == 1:
            for task in waiting:
                yield from self._preparation.perform(task)
            return
        while len(self._processes) < min(number, len(waiting)):
            self._processes.append(_Process(self._config, self._events, self._lock))
        busy = 0
        for process in self._processes:
            busy += process.begin(waiting)
        while busy:
            process, event = self._events.get()
            if event is None:
                raise ChildProcessError(process.obituary())
            if "error" in event:
                raise _error(event["error"], process.doing)
            if "done" in event:
                busy += process.begin(waiting) - 1
            else:
                yield event


class _Process:
    """One worker, and the thread that listens to it."""

    def __init__(self, config: PrepareConfig, events: queue.SimpleQueue, lock: BinaryIO | None) -> None:
        own = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "grist_data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | own | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            pass_fds=(lock.fileno(),) if lock is not None and os.name == "posix" else (),
        )
        self._task: Task | None = None
        self._write({"config": dataclasses.asdict(config), "source": _home(config.source)})
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    @property
    def doing(self) -> str:
        return describe(self._task) if self._task is not None else "before its first task"

    def begin(self, waiting: collections.deque[Task]) -> int:
        """Give it the next task; 0 when there is none."""
        if not waiting:
            return 0
        self._task = waiting.popleft()
        self._write(self._task)
        return 1

    def obituary(self) -> str:
        status = self._popen.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        memory = " (for want of memory? use fewer workers)" if status == -9 else ""
        return f"a worker {how}{memory} {self.doing}: run the same command again, it goes on from here"

    def end(self, at_once: bool) -> None:
        if at_once:
            self._popen.kill()
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()
        self._popen.wait()

    def _write(self, line: dict[str, Any]) -> None:
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died, which the thread that listens reports
            self._popen.stdin.write(json.dumps(line).encode() + b"\n")
            self._popen.stdin.flush()

    def _listen(self, events: queue.SimpleQueue) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            events.put((self, json.loads(line)))
        events.put((self, None))


def _home(source: str) -> tuple[str, str] | None:
    """Module and name under which another process finds the source; None for one that is made while running."""
    function = SOURCES[source]
    module, name = getattr(function, "__module__", "__main__"), getattr(function, "__qualname__", "")
    found = getattr(sys.modules.get(module), name, None)
    return (module, name) if module != "__main__" and found is function else None


def _error(facts: dict[str, Any], doing: str) -> BaseException:
    """The error of a worker as one of this process: of the same type, where that is a builtin one of a message."""
    kind = getattr(builtins, facts["type"], None)
    message = f"{facts['message']} ({doing})"
    if not (isinstance(kind, type) and issubclass(kind, (ValueError, OSError, ImportError))):
        return ChildProcessError(f"{facts['type']}: {message}\n{facts['traceback']}")
    if issubclass(kind, UnicodeError):
        return ValueError(message)
    return kind(facts["errno"], message) if facts["errno"] is not None else kind(message)
