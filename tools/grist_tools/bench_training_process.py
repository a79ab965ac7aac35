"""A contestant of the training benchmark in a process of its own: its memory is its own, and it sleeps while others train."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from grist_tools.bench_load_process import resident_bytes
from grist_tools.bench_training_steps import STEPS, Setup, batches
from grist_tools.quiet_turns import undisturbed


class Turn(NamedTuple):
    """One turn: milliseconds of a step by the clock and of the process's own processor time, means over the steps of the turn,
    and how many cores other processes used meanwhile."""

    ms: float
    cpu_ms: float
    others: float | None


class Contestant:
    """A process that trains when it is told to.

    Raises RuntimeError with the last words of the process where that fails.
    """

    def __init__(self, who: str, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self.who = who
        self._process = context.Process(target=_serve, args=(there, who, setup), daemon=True)
        self._process.start()
        there.close()

    def losses(self, steps: int) -> list[float]:
        """Of the next steps, which are not timed."""
        return self._ask("losses", steps)

    def turn(self, steps: int, patience: float) -> Turn:
        """So many steps, again while others disturb them and the seconds last."""
        return Turn(*self._ask("turn", steps, patience))

    def peak_bytes(self) -> int:
        """CUDA: the most that tensors took. CPU: the most that the process held beside what it began with, before the model."""
        return self._ask("peak")

    def stop(self) -> None:
        self._here.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, *question: Any) -> Any:
        try:
            self._here.send(question)
            well, answer = self._here.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            raise RuntimeError(f"{self.who} ended with status {self._process.exitcode}") from error
        if not well:
            raise RuntimeError(f"{self.who} failed:\n{answer}")
        return answer


def _serve(asked: Connection, who: str, setup: Setup) -> None:
    try:
        trainer = _Trainer(who, setup)
        while True:
            name, *arguments = asked.recv()
            asked.send((True, getattr(trainer, name)(*arguments)))
    except EOFError:  # nobody asks any more
        return
    except Exception:
        asked.send((False, traceback.format_exc()[-3000:]))


class _Trainer:
    def __init__(self, who: str, setup: Setup) -> None:
        import torch

        from grist_eval.environment import provenance

        provenance(setup.device)  # what both import is there before memory is counted
        self.setup, self.cuda = setup, setup.device == "cuda"
        self.before = 0 if self.cuda else resident_bytes("VmHWM")
        self.step, self.done = STEPS[who](setup), 0
        self.torch = torch

    def losses(self, steps: int) -> list[float]:
        return [float(self._next()) for _ in range(steps)]

    def turn(self, steps: int, patience: float) -> tuple[float, float, float | None]:
        (ms, cpu_ms), others = undisturbed(lambda: self._timed(steps), time.perf_counter() + patience)
        return ms, cpu_ms, others

    def peak(self) -> int:
        if self.cuda:
            return self.torch.cuda.max_memory_allocated()
        return resident_bytes("VmHWM") - self.before

    def _timed(self, steps: int) -> tuple[float, float]:
        self._wait()
        start, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self._next()
        self._wait()
        return 1e3 * (time.perf_counter() - start) / steps, 1e3 * (time.process_time() - used) / steps

    def _next(self) -> Any:
        self.done += 1
        return self.step(batches(self.setup, self.done))

    def _wait(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()
