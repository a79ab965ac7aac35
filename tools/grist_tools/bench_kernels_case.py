"""One case of one op: check it and its peers, then time all that are right, side by side. Needs only torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from grist_kernels import backend
from grist_kernels.cases import Arguments, Case, Expected, expected, run
from grist_tools.bench_kernels_times import DIRECTIONS, Calls, calls, first_line, launches, times
from grist_tools.kernel_peers import Peer, peers
from grist_tools.kernel_targets import targets
from grist_tools.kernel_work import work

OURS = ""  # the name of our own op among its peers


def inputs(case: Case, dtype: torch.dtype, device: str) -> Arguments:
    """A case's arguments. For a GPU they are made there: a large case takes a CPU longer than all else together."""
    if not device.startswith("cuda"):
        return case.arguments(dtype, device)
    with torch.device(device):
        built = case.build(torch.Generator(device).manual_seed(0))
    return replace(case, build=lambda generator: built).arguments(dtype, device)


def oracle(op, case: Case) -> Callable[..., Any]:
    """What a case is compared with: the op's reference; for a large case the one that computes it in blocks, if there is one,
    for all at once would not fit into any memory."""
    in_blocks = getattr(import_module(f"grist_kernels.{op.name}.reference"), f"{op.name}_in_blocks", None)
    return in_blocks if case.large and in_blocks is not None else op.reference


def error_ratio(got: dict[str, Tensor], wanted: Mapping[str, Expected]) -> float:
    """The worst of each tensor's largest error over its allowed error: above 1 is wrong.

    A result that should be finite and is not, or has another shape, is infinitely wrong.
    """
    worst = 0.0
    for name, value in wanted.items():
        found, want = got[name].double(), value.want
        if found.shape != want.shape or not bool(found.isfinite().all()):
            return float("inf")
        error = (found - want).abs().max().item() if want.numel() else 0.0
        if error > 0:
            worst = max(worst, error / value.allowed if value.allowed else float("inf"))
    return worst


def bench_case(
    op, case: Case, dtype: torch.dtype, device: str, *, which_peers: str, budget_ms: float
) -> dict[str, Any]:
    """One row: the check, our times, and the peers' checks and times. Nothing that is wrong is timed.

    which_peers is "none", "some" or "all", as kernel_peers has it; budget_ms is for each median.
    """
    arguments = inputs(case, dtype, device)
    row = _description(op, case, dtype, device, arguments)
    started = time.perf_counter()
    try:
        wanted = expected(oracle(op, case), case, arguments)
        row |= _verdict(error_ratio(run(op.door, arguments, case.gradients), wanted))
    except torch.OutOfMemoryError as error:
        return row | {"ok": False, "failed": f"not checked, out of memory: {first_line(error)}"}
    if not row["ok"]:
        return row
    contest = {OURS: calls(op.name, op.door, arguments, case.gradients)}
    others = {} if which_peers == "none" else peers(op, arguments, all_of_them=which_peers == "all")
    row["peers"] = {}
    for name, peer in others.items():
        row["peers"][name], its_calls = _admitted(peer, op.name, case, arguments, wanted)
        if its_calls is not None:
            contest[name] = its_calls
    del wanted
    row["seconds_to_check"] = round(time.perf_counter() - started, 2)
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    for name, parts in times(contest, device, budget_ms).items():
        (row if name == OURS else row["peers"][name]).update(parts)
    _describe_work(row, op.name, contest[OURS], arguments, case.gradients, targets(op.name, arguments, dtype, device))
    return row


def _description(op, case: Case, dtype: torch.dtype, device: str, arguments: Arguments) -> dict[str, Any]:
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    return {
        "op": op.name,
        "case": case.name,
        "large": case.large,
        "dtype": str(dtype).removeprefix("torch."),
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "options": {name: value for name, value in arguments.items() if name not in tensors and value is not None},
        "implementation": backend.implementation(op.name, torch.device(device).type),
    }


def _verdict(ratio: float) -> dict[str, Any]:
    if ratio == float("inf"):  # JSON has no infinity
        return {"error_over_allowed": None, "ok": False, "failed": "a result is not finite, or has another shape"}
    return {"error_over_allowed": ratio, "ok": ratio <= 1}


def _admitted(
    peer: Peer, op_name: str, case: Case, arguments: Arguments, wanted: Mapping[str, Expected]
) -> tuple[dict[str, Any], Calls | None]:
    """What a row says of a peer, and its calls if it is right and each of them runs.

    A peer is other people's code, and may raise anything: that is written down, and ends no measurement of our own ops.
    """
    found: dict[str, Any] = {"note": peer.note} if peer.note else {}
    if peer.absent:
        return found | {"ok": False, "failed": f"absent: {peer.absent}"}, None
    gradients = () if peer.forward_only else case.gradients
    if peer.forward_only:
        wanted = {name: value for name, value in wanted.items() if not name.startswith("d_")}
    try:
        own = peer.prepare(arguments)
        found |= _verdict(error_ratio(run(peer.function, own, gradients), wanted))
        if not found["ok"]:
            return found, None
        its_calls = calls(op_name, peer.function, own, gradients)
        for call in its_calls.values():
            if call.before is not None:
                call.before()
            call.work()
    except Exception as error:
        return found | {"ok": False, "failed": f"{type(error).__name__}: {first_line(error)}"}, None
    return found, its_calls


def _describe_work(
    row: dict[str, Any],
    op_name: str,
    ours: Calls,
    arguments: Arguments,
    gradients: tuple[str, ...],
    wanted: dict[str, float],
) -> None:
    """What each direction has to do at least, the share of the ceiling to reach, and how many kernels of ours it launches."""
    todo = work(op_name, arguments, gradients, ours["forward"].work())
    amounts = {
        "forward": (todo.forward_bytes, todo.forward_flops),
        "backward": (todo.backward_bytes, todo.backward_flops),
        "forward_backward": (todo.both_bytes, todo.both_flops),
    }
    for direction in DIRECTIONS:
        if direction not in row:
            continue
        row[direction] |= dict(zip(("bytes", "flops"), amounts[direction], strict=True))
        if direction in wanted:
            row[direction]["target"] = wanted[direction]
        if row["implementation"] == "triton" and direction in ours:
            row[direction]["triton_launches"] = launches(ours[direction])
