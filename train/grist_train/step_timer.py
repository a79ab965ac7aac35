"""Where the time of a step goes: marks that are set as it runs and read later, so that nothing waits for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepTimes:
    """The marks of one step: when it began, then (part, when it ended), in order; seconds on the host, or CUDA events."""

    begin: float | torch.cuda.Event
    marks: tuple[tuple[str, float | torch.cuda.Event], ...]

    def milliseconds(self) -> dict[str, float]:
        """Time of each part, those of several micro-batches added up. With CUDA events, waits for the last of them."""
        parts: dict[str, float] = defaultdict(float)
        before = self.begin
        last = self.marks[-1][1]
        if isinstance(last, torch.cuda.Event):
            last.synchronize()
        for part, at in self.marks:
            parts[part] += _elapsed_ms(before, at)
            before = at
        return dict(parts)

    def row(self) -> dict[str, float]:
        """`time_PART_ms`, as a row of `metrics.jsonl` has them."""
        return {f"time_{part}_ms": round(ms, 3) for part, ms in self.milliseconds().items()}


class StepTimer:
    """Cuts the time of a run into steps, and those into named parts: nothing is left out and nothing counted twice.

    On CUDA a mark is an event on the stream that computes, so a part is what the device spent on it, idle time included: a
    batch that was fetched while the device still computed costs nothing, one that came too late costs what the device waited.
    Where the computation waits for weights of other ranks, the time is in forward or backward; how much that is, events on one
    stream cannot tell (a profile can). On other devices a part is the host's time, with that of a device it waits for.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._begin = self._now()
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def mark(self, part: str) -> None:
        """What happened since the last mark was this part."""
        self._marks.append((part, self._now()))

    def lap(self) -> StepTimes:
        """End a step; what is left since the last mark is its part `other`. The next one begins here, so that what comes
        between two steps, a checkpoint say, counts in the later one."""
        self.mark("other")
        times = StepTimes(self._begin, tuple(self._marks))
        self._begin = self._marks[-1][1]
        self._marks.clear()
        return times

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _elapsed_ms(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, torch.cuda.Event):
        assert isinstance(after, torch.cuda.Event)
        return before.elapsed_time(after)
    assert isinstance(after, float)
    return (after - before) * 1e3
