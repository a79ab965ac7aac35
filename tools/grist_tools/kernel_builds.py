"""Compile every row of the launch tables for every architecture, and hold the machine code against the kernels' budgets.

    python -m grist_tools.kernel_builds                          # all ops; minutes, less where Triton has cached builds
    python -m grist_tools.kernel_builds --ops rms_norm,rope --json builds.json
    python -m grist_tools.kernel_builds --write-readme           # renew the table in kernels/README.md

Needs no GPU: Triton compiles for one that is not there, and brings the disassembler. What each row launches is found by
calling the op on tensors without memory, at the row's size, forward and backward. Ends with status 1 if a budget is broken.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grist_tools.console import fail, parser_for, run, table
from grist_tools.kernel_builds_section import README, replaced, section, summary

if TYPE_CHECKING:
    from grist_kernels.budget import Budget
    from grist_tools.binary_report import Binary, BinaryReport
    from grist_tools.kernel_recorder import Build

TOKENS = 64  # of the recorded calls; it decides nothing but that their number is a multiple of 16
PROGRESS_SECONDS = 5


class Use(NamedTuple):
    """A launch that needs a build: of which kernel, in a call of which type, size bucket and case."""

    op: str
    kernel: str
    dtype: str
    size: int
    case: str


Plan = dict["Build", list[Use]]


def parser() -> argparse.ArgumentParser:
    parser = parser_for("kernel_builds", __doc__)
    parser.add_argument("--ops", metavar="A,B", help="only these ops (default: all that have a launch table)")
    parser.add_argument("--json", metavar="FILE", help="write every build's figures here")
    parser.add_argument(
        "--write-readme", action="store_true", help="write the table of kernels/README.md (all ops only)"
    )
    return parser


def plan(op: str) -> Plan:
    """The different builds that an op's launch table asks for.

    Raises ValueError if the table is empty, or has a row that no call of <op>.cases.at_size reads.
    """
    import torch

    from grist_kernels import launch
    from grist_tools.kernel_recorder import GPUS, build_of, record

    rows = launch.table(op)
    if not rows:
        raise ValueError(
            f"{launch.table_path(op)} has no rows; `python -m grist_tools.tune_kernels --formula` writes them"
        )
    at_size = import_module(f"grist_kernels.{op}.cases").at_size
    kernels: dict[tuple[str, str, int], set[str]] = {}
    for row in rows:
        kernels.setdefault((row["architecture"], row["dtype"], row["size"]), set()).add(row["kernel"])
    found: Plan = {}
    for (architecture, dtype, size), unread in kernels.items():
        for case in at_size(size, TOKENS):
            launches, read = record(op, case, getattr(torch, dtype), GPUS[architecture])
            unread -= {kernel for kernel, read_size in read if read_size == size}
            for launched in launches:
                use = Use(op, launched.name, dtype, size, case.name)
                found.setdefault(build_of(launched, architecture), []).append(use)
        if unread:
            where = f"{architecture} {dtype} {size}"
            raise ValueError(
                f"no call of {op}.cases.at_size({size}, {TOKENS}) reads the rows {sorted(unread)} of {where}"
            )
    return found


def budgets(op: str, kernels: set[str]) -> dict[str, Budget]:
    """An op's BUDGETS: kernel -> Budget. Raises ValueError for one of a kernel that is none of those launched."""
    stated = getattr(import_module(f"grist_kernels.{op}.triton_kernel"), "BUDGETS", {})
    if unknown := set(stated) - kernels:
        raise ValueError(f"{op}: BUDGETS names {sorted(unknown)}, but what is launched is {sorted(kernels)}")
    return stated


def build_one(build: Build) -> Binary:
    """Compile one build; what a worker process does."""
    from grist_tools.binary_report import binary_of
    from grist_tools.kernel_recorder import compiled

    return binary_of(compiled(build), build.architecture)


def build_all(builds: list[Build]) -> list[BinaryReport]:
    """Every build's report, compiled by as many processes as there are cores, with progress on stderr.

    Raises RuntimeError naming a build that does not compile.
    """
    from grist_tools.binary_report import reports

    # Not forked: PyTorch and LLVM have threads by now.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(build_one, build): build for build in builds}
        try:
            wait_for(waiting)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return reports(future.result() for future in waiting)


def wait_for(waiting: dict[Future, Build]) -> None:
    started = said = time.perf_counter()
    for done, future in enumerate(as_completed(waiting), 1):
        if error := future.exception():
            raise RuntimeError(f"cannot build {waiting[future]}: {error}") from error
        now = time.perf_counter()
        if now - said > PROGRESS_SECONDS or done == len(waiting):
            said = now
            print(f"[{done}/{len(waiting)} builds, {now - started:.0f} s]", file=sys.stderr, flush=True)


def judged(build: Build, uses: list[Use], found: BinaryReport, budget: Budget) -> dict[str, Any]:
    """A build of one op, as --json writes it."""
    from grist_tools.binary_report import broken

    if all(use.dtype == "float32" for use in uses):  # multiplied exactly, which matrix units do not
        budget = replace(budget, tensor_core=False, spilled_bytes=budget.float32_spilled_bytes)
    return {
        "op": uses[0].op,
        "kernel": uses[0].kernel,
        "architecture": build.architecture,
        "used_by": [{"dtype": use.dtype, "size": use.size, "case": use.case} for use in uses],
        "options": dict(build.options),
        **found.as_json(),
        "broken": broken(found, budget, build.architecture),
    }


def results(ops: list[str]) -> dict[str, Any]:
    """Plan, build and judge: what --json writes."""
    import triton

    from grist_kernels.budget import Budget

    planned: Plan = {}
    limits = {}
    for op in ops:
        builds = plan(op)
        limits[op] = budgets(op, {use.kernel for uses in builds.values() for use in uses})
        for build, uses in builds.items():  # ops may share a kernel, and each has its own budget for it
            planned.setdefault(build, []).extend(uses)
    rows = []
    for (build, uses), found in zip(planned.items(), build_all(list(planned)), strict=True):
        for op in dict.fromkeys(use.op for use in uses):
            mine = [use for use in uses if use.op == op]
            rows.append(judged(build, mine, found, limits[op].get(mine[0].kernel, Budget())))
    return {"what": "kernel builds", "triton": triton.__version__, "builds": rows}


def results_table(report: dict[str, Any]) -> str:
    """A line for each kernel and architecture."""
    header = ["op kernel architecture", "builds", "registers", "spilled", "shared", "widest", "main load"]
    lines = []
    for (op, kernel, architecture), worst in summary(report).items():
        figures = (
            worst.builds,
            worst.registers,
            worst.spilled_bytes,
            worst.shared_bytes,
            worst.widest_load,
            worst.main_load,
        )
        lines.append([f"{op} {kernel} {architecture}", *map(str, figures)])
    return table(header, lines)


def build_text(build: dict[str, Any]) -> str:
    """A build of a report in a few words: rms_norm backward sm_90 bfloat16 4096."""
    first = build["used_by"][0]
    return f"{build['op']} {build['kernel']} {build['architecture']} {first['dtype']} {first['size']}"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return fail("kernel_builds", ValueError("TRITON_INTERPRET=1 leaves nothing to build: unset it"))
    if options.write_readme and options.ops:
        return fail("kernel_builds", ValueError("--write-readme is about all ops: leave --ops out"))
    from grist_tools.kernel_recorder import ops_with_tables

    try:
        report = results(ops_with_tables(options.ops))
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if options.write_readme:
            README.write_text(replaced(README.read_text(encoding="utf-8"), section(report)), encoding="utf-8")
    except (OSError, ValueError) as error:
        return fail("kernel_builds", error)
    print(results_table(report))
    over = [build for build in report["builds"] if build["broken"]]
    for build in over:
        print(f"BROKEN {build_text(build)}: {'; '.join(build['broken'])}")
    print(f"{len(report['builds'])} builds, {len(over)} over budget (triton {report['triton']})")
    return 1 if over else 0


if __name__ == "__main__":
    run(main)
