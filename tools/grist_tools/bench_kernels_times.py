"""How one case is timed: every direction, every contestant in turns, and what the numbers mean. Needs only torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grist_kernels import launch
from grist_kernels.cases import Arguments
from grist_tools.timing import Call, Ceilings, alternate

DIRECTIONS = ("forward", "backward", "forward_backward")
# Their gradients may be made while the logits are at hand, in the forward: a backward alone would look like nothing.
BY_DIFFERENCE = frozenset({"linear_cross_entropy"})

Calls = dict[str, Call]  # by direction

HOW = {
    "forward": "one call under no_grad, as inference runs it",
    "backward": "torch.autograd.grad alone, after a forward of its own that is not timed; for linear_cross_entropy, whose "
    "gradients may be made in the forward, the medians' difference forward_backward - forward",
    "forward_backward": "one call and torch.autograd.grad",
    "d_outputs": "random normal; 1 for a scalar",
    "turns": "contestants of a case are timed in turns, in rounds; a median is over all rounds",
    "median_ms on CUDA": "device events around the call, after 256 MiB were overwritten to empty the cache; for short calls it "
    "holds time in which the device waits for the host",
    "median_ms on a CPU": "the host's clock, after a call of the same that is not timed: caches are warm",
    "graph_ms": "the same between events around the replay of a CUDA graph of the call: the device's time alone",
    "host_us": "the host's time for one call that it does not wait for, over 20 calls after each other",
    "bytes, flops": "least amounts: what a direction needs is read once, what it makes is written once, matrix products",
    "fraction_of_ceiling": "the least time for these amounts over median_ms, at the copy and matrix-product rates of this run "
    "(the higher of before and after); graph_fraction_of_ceiling: over graph_ms",
}


def calls(op_name: str, function: Callable, arguments: Arguments, gradients: tuple[str, ...]) -> Calls:
    """What is timed, by direction: the forward as inference runs it; forward and backward; the backward by itself, after a
    forward that is not timed (a retained graph would do for ours, but some peers overwrite what they kept).

    The gradients of the outputs are random, and 1 for a scalar, as in training.
    """

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return as_list(function(**arguments))

    found = {"forward": Call(forward)}
    if not gradients:
        return found
    leaves = {name: arguments[name].detach().requires_grad_() for name in gradients}
    filled = {**arguments, **leaves}
    d_outputs = [torch.randn_like(out) if out.dim() else torch.ones_like(out) for out in forward()]
    kept: list[Tensor] = []

    def keep() -> None:
        kept[:] = as_list(function(**filled))

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(kept, list(leaves.values()), d_outputs)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(as_list(function(**filled)), list(leaves.values()), d_outputs)

    found["forward_backward"] = Call(both)
    if op_name not in BY_DIFFERENCE:
        found["backward"] = Call(backward, keep)
    return found


def as_list(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def times(contest: dict[str, Calls], device: str, budget_ms: float) -> dict[str, dict[str, Any]]:
    """Name -> direction -> times, each direction measured in turns."""
    found: dict[str, dict[str, Any]] = {name: {} for name in contest}
    for direction in DIRECTIONS:
        these = {name: its_calls[direction] for name, its_calls in contest.items() if direction in its_calls}
        if not these:
            continue
        parts = {name: timing.as_json() for name, timing in alternate(these, device, budget_ms).items()}
        if device.startswith("cuda"):
            _add_short(parts, these, device, budget_ms)
        for name, part in parts.items():
            found[name][direction] = part
    for parts in found.values():
        _add_difference(parts)
    return found


def _add_short(parts: dict[str, dict[str, Any]], these: Calls, device: str, budget_ms: float) -> None:
    """Where a call is short for any of them: the host's time (host_us), and a CUDA graph's (graph_ms) or why there is none."""
    from grist_tools.timing_short import captured, host_us, is_short

    hosts = {name: host_us(call) for name, call in these.items() if parts[name]["median_ms"] < 1}
    for name, host in hosts.items():
        parts[name]["host_us"] = round(host, 2)
    if not any(is_short(parts[name]["median_ms"], host) for name, host in hosts.items()):
        return
    graphs: Calls = {}
    for name in hosts:
        try:
            graphs[name] = captured(these[name])
        except Exception as error:  # what a peer does is not ours to know; of ours, too, the page shows it
            parts[name]["no_graph"] = f"{type(error).__name__}: {first_line(error)}"
    if graphs:
        for name, timing in alternate(graphs, device, budget_ms).items():
            parts[name]["graph_ms"] = timing.as_json()["median_ms"]


def _add_difference(parts: dict[str, Any]) -> None:
    if "forward_backward" not in parts or "backward" in parts:
        return
    difference = parts["forward_backward"]["median_ms"] - parts["forward"]["median_ms"]
    if difference > 0:  # else nothing but noise
        parts["backward"] = {"median_ms": round(difference, 6), "how": "forward_backward - forward"}


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def launches(call: Call) -> int:
    """How many Triton kernels of ours one call launches."""
    if call.before is not None:
        call.before()
    with _counted() as count:
        call.work()
    return count[0]


@contextmanager
def _counted() -> Iterator[list[int]]:
    count, run_one = [0], launch.run

    def counting(*arguments: Any, **constants: Any) -> None:
        count[0] += 1
        run_one(*arguments, **constants)

    launch.run = counting
    try:
        yield count
    finally:
        launch.run = run_one


def add_rates(row: dict[str, Any], limits: Ceilings) -> None:
    """Write a row's rates: bytes and operations a second, and the share of what is possible on this device at best.

    Where the host took part in the time, the share without it (of the CUDA graph's time) stands beside.
    """
    for part in (row[direction] for direction in DIRECTIONS if direction in row):
        seconds = part["median_ms"] / 1e3
        part["gigabytes_per_second"] = round(part["bytes"] / seconds / 1e9, 3)
        if part["flops"]:
            part["teraflops"] = round(part["flops"] / seconds / 1e12, 4)
        floor = limits.floor_ms(part["bytes"], part["flops"])
        part["fraction_of_ceiling"] = round(floor / part["median_ms"], 4)
        if "graph_ms" in part:
            part["graph_fraction_of_ceiling"] = round(floor / part["graph_ms"], 4)
