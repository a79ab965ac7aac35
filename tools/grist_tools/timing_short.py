"""Calls so short that the host decides their time: the host's share, and the device's alone. CUDA only; needs only torch.

Between two events around a short call the device may wait for the host to launch. Replaying a CUDA graph of the call leaves
the device's own time; the host's is measured without waiting for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from grist_tools.timing import ROUNDS, WARMUP, Call

SHORT_MS = 0.06
# With 40 launches a call this stays below the thousand or so that a queue holds: on a full one the host waits for the device.
CALLS = 20


def host_us(call: Call) -> float:
    """Microseconds that the host spends in one asynchronous call: the median over rounds of a few calls each."""
    found = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        spent = 0.0
        for _ in range(CALLS):
            if call.before is not None:
                call.before()
            start = time.perf_counter()
            call.work()
            spent += time.perf_counter() - start
        found.append(1e6 * spent / CALLS)
    torch.cuda.synchronize()
    return median(found)


def is_short(median_ms: float, host: float) -> bool:
    """Whether the host's time (in microseconds) may be part of a call's median between device events."""
    return median_ms < max(SHORT_MS, 2e-3 * host)


def captured(call: Call) -> Call:
    """The same call as CUDA graphs, one for what runs before it and one for the work, in one pool of memory.

    Backward alone works too: its forward is the graph before it, and runs on the stream that is captured, as autograd
    runs a backward on the stream of its forward.

    Raises RuntimeError if the call waits for the device, or does something else that a graph cannot hold.
    """
    outer, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream), _waiting_is_an_error():
            for _ in range(WARMUP):
                if call.before is not None:
                    call.before()
                call.work()
        outer.wait_stream(stream)
        pool = torch.cuda.graph_pool_handle()
        before = None if call.before is None else _graph(call.before, stream, pool)
        work = _graph(call.work, stream, pool)
    finally:
        torch.cuda.set_stream(outer)  # a capture that fails leaves its own stream current
    return Call(work.replay, None if before is None else before.replay)


def _graph(function: Callable[[], Any], stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        function()
    return graph


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """A call that waits for the device is found before a capture: an aborted capture would leave its stream unusable."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
