"""A process of `workers.py`: lines of JSON in (settings first, then tasks), lines of JSON out (what is done)."""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; whoever began this process ends it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a source prints must not get between the answers
    lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    first = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        preparation = _preparation(first)
        while True:
            task = lines.get()
            for done in preparation.perform(task):
                say(done)
            say({"done": True})
    except Exception as error:
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
        facts = {"type": kind.__name__, "message": str(error), "errno": None}
        if isinstance(error, OSError) and error.errno is not None:
            named = f": {error.filename!r}" if error.filename is not None else ""
            facts |= {"message": f"{error.strerror}{named}", "errno": error.errno}
        say({"error": facts | {"traceback": traceback.format_exc()}})


def _listen(lines: queue.SimpleQueue) -> None:
    for line in sys.stdin.buffer:
        lines.put(json.loads(line))
    os._exit(0)  # nobody is there any more: neither for what is being done nor for what would be


def _preparation(first: dict[str, Any]) -> Any:
    from grist_data.preparation import Preparation
    from grist_data.prepare_config import PrepareConfig
    from grist_data.sources import SOURCES

    module, name = first["source"]
    SOURCES.setdefault(first["config"]["source"], getattr(importlib.import_module(module), name))
    return Preparation(PrepareConfig.from_values(first["config"]), writer=f".{os.getpid()}")


if __name__ == "__main__":
    main()
