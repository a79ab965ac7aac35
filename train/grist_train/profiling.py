"""A profile of chosen steps: a trace for Perfetto, a memory snapshot, and the largest costs in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from grist_train.distributed import World
from grist_train.logging_config import ProfileConfig
from grist_train.step_timer import StepTimes

ROWS = 15
NAME_WIDTH = 72  # a kernel's template arguments fill pages
SNAPSHOT_ENTRIES = 200_000  # allocations and releases that a memory snapshot remembers, the newest


class StepProfiler:
    """Records the steps that a run asks for; every rank writes a trace of its own.

    RUN/profile/steps-A-B-rank-R.json.gz opens in https://ui.perfetto.dev, ...-memory.pickle (CUDA) in
    https://docs.pytorch.org/memory_viz; ...txt is what `write` tells. Recording slows a step down, mostly on the host.
    """

    def __init__(self, config: ProfileConfig | None, folder: Path, world: World) -> None:
        self._config, self._folder, self._world = config, folder, world
        self._recording: profile | None = None
        self._first = 0
        self._times: list[StepTimes] = []

    def begin(self, step: int) -> None:
        """Before anything of a step, counted from 1. A run that is resumed among the steps to record begins there."""
        config = self._config
        if config is None or self._recording is not None or not config.steps[0] <= step <= config.steps[1]:
            return
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            if config.memory:
                torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
            torch.cuda.synchronize(self._world.device)  # else the rest of the step before is in the profile
        self._recording = profile(activities=activities, profile_memory=config.memory)
        self._first = step
        self._recording.start()

    def end(self, step: int, times: StepTimes) -> bool:
        """After a step; whether it was the last to record, so that `write` is due."""
        if self._recording is None or self._config is None:
            return False
        self._times.append(times)
        return step >= self._config.steps[1]  # above it where that one was left out

    @property
    def has_something(self) -> bool:
        """Whether steps were recorded that are not written yet: true at the end of a run that ends among them."""
        return bool(self._times)

    def write(self) -> str:
        """Stop recording and write what was recorded -> what is in it, in words. Takes seconds."""
        assert self._recording is not None
        assert self._config is not None
        on_cuda = self._world.device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self._world.device)
        recording, times = self._recording, self._times
        self._recording, self._times = None, []
        recording.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = f"steps-{self._first}-{self._first + len(times) - 1}-rank-{self._world.rank}"
        partial = self._folder / f".{stem}.partial.json.gz"
        recording.export_chrome_trace(str(partial))
        partial.replace(self._folder / f"{stem}.json.gz")
        if on_cuda and self._config.memory:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{stem}-memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        parts = summed([each.milliseconds() for each in times])
        text = report(costs(recording.events() or [], on_cuda), parts, len(times), on_cuda)
        (self._folder / f"{stem}.txt").write_text(text + "\n", encoding="utf-8")
        return f"profile: {self._folder / stem}.json.gz (https://ui.perfetto.dev)\n{text}"


class Cost(NamedTuple):
    """One operation, or kernel of the device: time in ms, without that of operations inside it, and calls."""

    name: str
    ms: float
    calls: int


class Costs(NamedTuple):
    """ops: the largest first. busy_ms: in which the device did anything at all; None where there is no device but the host."""

    ops: list[Cost]
    busy_ms: float | None


def summed(steps: list[dict[str, float]]) -> dict[str, float]:
    """Milliseconds of each part over all steps."""
    parts: dict[str, float] = defaultdict(float)
    for step in steps:
        for part, ms in step.items():
            parts[part] += ms
    return dict(parts)


def costs(events: Iterable[FunctionEvent], on_cuda: bool) -> Costs:
    """What the time went to: kernels and copies of the device where there is one, else operations of the host."""
    ms: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    spans: list[tuple[float, float]] = []
    for event in events:
        on_device = event.device_type == DeviceType.CUDA
        # Annotations of the host are mirrored to the device as ranges over the kernels they launched.
        if on_device != on_cuda or (on_device and event.is_user_annotation):
            continue
        ms[event.name] += (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e3
        calls[event.name] += 1
        spans.append((event.time_range.start, event.time_range.end))
    ops = sorted((Cost(name, ms[name], calls[name]) for name in ms), key=lambda cost: -cost.ms)
    return Costs(ops, covered(spans) / 1e3 if on_cuda else None)


def covered(spans: list[tuple[float, float]]) -> float:
    """The length that intervals (start, end) cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def report(found: Costs, parts: dict[str, float], steps: int, on_cuda: bool) -> str:
    """The parts of a step, then the largest operations. Shares are of the time that the steps took; operations that overlap,
    on several streams or threads, may add up to more than all of it."""
    whole = sum(parts.values())
    shares = sorted(parts.items(), key=lambda item: -item[1])
    lines = [
        f"a step took {whole / steps:.1f} ms: " + ", ".join(f"{part} {ms / whole:.1%}" for part, ms in shares if ms),
        f"{parts.get('data', 0.0) / whole:.1%} of it waits for data",
    ]
    if found.busy_ms is not None:
        lines.append(f"the device is busy {min(1.0, found.busy_ms / whole):.1%} of it")
    nccl = sum(cost.ms for cost in found.ops if "nccl" in cost.name.lower())
    if nccl:
        lines.append(f"communication runs {nccl / whole:.1%} of it, beside computation as far as it can")
    if found.ops:
        top = found.ops[0]
        what = "kernel" if on_cuda else "operation"
        lines.append(
            f"the largest {what}: {_short(top.name)}, {top.ms / whole:.1%}, {top.calls / steps:.0f} calls a step"
        )
        lines.append(f"{'share':>7} {'ms/step':>9} {'calls/step':>11}  {what}")
        lines += [
            f"{op.ms / whole:>7.1%} {op.ms / steps:>9.2f} {op.calls / steps:>11.1f}  {_short(op.name)}"
            for op in found.ops[:ROWS]
        ]
    return "\n".join(lines)


def _short(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 3] + "..."
