"""Check and time every op on this machine, beside whatever else computes the same.

    python -m grist_tools.bench_kernels                                   # small cases, this machine's device
    python -m grist_tools.bench_kernels --device cuda --cases large       # real sizes
    python -m grist_tools.bench_kernels --ops rms_norm,rope --peers       # torch.compile and Liger-Kernel as peers too

A case is first compared with its reference in float64, outputs and gradients; what is wrong, ours or a peer, is not timed, and
if it is ours the command ends with status 1. Results go to benchmarks/: a JSON after every case, and in the end a page with
a picture (grist_tools.kernel_page), with this device's own copy and matrix-product rates beside them. A fraction of the
ceiling above 100% means that the data fitted into a cache. Ctrl-C keeps what is done. Needs only torch; the picture needs
matplotlib.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_tools.bench_kernels_text import results_table, row_text
from grist_tools.console import fail, parser_for, run

if TYPE_CHECKING:
    from grist_kernels.cases import Case

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "float32": "float32"}


def parser() -> argparse.ArgumentParser:
    parser = parser_for("bench_kernels", __doc__)
    parser.add_argument("--device", default="auto", help="auto (CUDA, else CPU), cpu or cuda (default: auto)")
    parser.add_argument("--ops", metavar="A,B", help="only these ops (default: all)")
    parser.add_argument(
        "--cases",
        metavar="KIND",
        help="small, large, all, or names of cases, A,B (default: all on CUDA, large ones first; small on a CPU)",
    )
    parser.add_argument("--dtypes", metavar="A,B", help="bf16, fp16, float32 (default: bf16 on CUDA, float32 on a CPU)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--peers", action="store_true", help="torch.compile and Liger-Kernel too (default: only PyTorch)"
    )
    which.add_argument("--no-peers", action="store_true", help="time only our own ops")
    parser.add_argument("--budget-ms", type=float, default=100.0, help="time for each median (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no case after this long (default: no limit)")
    parser.add_argument("--out", metavar="JSON", help="default: benchmarks/kernels-DEVICE-DATE.json")
    return parser


def chosen_ops(names: str | None) -> list[Any]:
    """Ops by name. Raises ValueError for an unknown one."""
    from grist_kernels import OPS

    wanted = list(OPS) if names is None else names.split(",")
    unknown = [name for name in wanted if name not in OPS]
    if unknown:
        raise ValueError(f"unknown op(s) {', '.join(unknown)}; there are {', '.join(OPS)}")
    return [OPS[name] for name in wanted]


def chosen_cases(ops: list[Any], kind: str) -> list[tuple[Any, Case]]:
    """(op, case) pairs, large ones first: all, the small or the large ones, or those of some names.

    Raises ValueError if there are none.
    """
    keep: dict[str, Callable[[Case], bool]] = {
        "all": lambda case: True,
        "small": lambda case: not case.large,
        "large": lambda case: case.large,
    }
    chosen = keep.get(kind, lambda case: case.name in kind.split(","))
    pairs = [(op, case) for op in ops for case in op.cases if chosen(case)]
    if not pairs:
        names = ", ".join(dict.fromkeys(case.name for op in ops for case in op.cases))
        raise ValueError(f"no case is called {kind}; there are small, large, all, {names}")
    return sorted(pairs, key=lambda pair: not pair[1].large)


def chosen_dtypes(names: str) -> list[str]:
    """PyTorch's names of the types. Raises ValueError for an unknown one."""
    if unknown := [name for name in names.split(",") if name not in DTYPES]:
        raise ValueError(f"unknown type(s) {', '.join(unknown)}; there are {', '.join(DTYPES)}")
    return [DTYPES[name] for name in names.split(",")]


def default_out(device_name: str, date: str, what: str = "kernels") -> Path:
    """benchmarks/WHAT-DEVICE-DATE.json, numbered from the second of a day on: a committed result is never edited."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in device_name.lower())
    stem = "-".join([what, *filter(None, slug.split("-")), date])
    folder = Path(__file__).parents[2] / "benchmarks"
    number, path = 1, folder / f"{stem}.json"
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


def output_of(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The checkout's commit, with `+changes` where files differ from it; None outside a checkout."""
    git = ("git", "-C", str(Path(__file__).parents[2]))
    head = output_of(*git, "rev-parse", "HEAD")
    return f"{head}+changes" if head and output_of(*git, "status", "--porcelain", "--untracked-files=no") else head


def gpu_state(device: str) -> str | None:
    """Driver, clocks, power and temperature of a GPU, as nvidia-smi has them; None without nvidia-smi."""
    if not device.startswith("cuda"):
        return None
    import torch

    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return output_of("nvidia-smi", "-i", which, f"--query-gpu={fields}", "--format=csv")


def new_report(device: str, command: list[str]) -> dict[str, Any]:
    """The report before anything was measured."""
    import importlib.metadata

    import torch

    from grist_eval.environment import provenance
    from grist_kernels import backend
    from grist_tools.bench_kernels_times import HOW

    where = provenance(device)
    where["versions"]["cuda"] = torch.version.cuda
    try:
        where["versions"]["liger-kernel"] = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        where["versions"]["liger-kernel"] = None
    return {
        "what": "kernels",
        "command": ["python", "-m", "grist_tools.bench_kernels", *command],
        "commit": commit(),
        **where,
        "threads": torch.get_num_threads(),
        "mode": backend.mode(),
        "how": HOW,
        "complete": False,
        "gpu_before": gpu_state(device),
        "ceilings": {},
        "rows": [],
    }


def measure(
    report: dict[str, Any], pairs: list, dtypes: list[str], device: str, options: argparse.Namespace, save: Callable
) -> None:
    """Fill a report with the rows of all cases and types; save() after each. Ctrl-C leaves a report fit to be saved."""
    import torch

    from grist_tools.bench_kernels_case import bench_case
    from grist_tools.bench_kernels_times import add_rates
    from grist_tools.timing import ceilings

    which = "none" if options.no_peers else "all" if options.peers else "some"
    started, total = time.perf_counter(), report["cases_planned"]
    for name in dtypes:
        dtype = getattr(torch, name)
        before = ceilings(device, dtype)
        report["ceilings"][name] = {"before": vars(before), "used": vars(before)}
        rows = []
        for op, case in pairs:
            if options.minutes is not None and time.perf_counter() - started > 60 * options.minutes:
                break
            rows.append(bench_case(op, case, dtype, device, which_peers=which, budget_ms=options.budget_ms))
            add_rates(rows[-1], before)
            report["rows"].append(rows[-1])
            save()
            passed, done = time.perf_counter() - started, len(report["rows"])
            # Large cases are first: what is left takes this long at most.
            left = f"{clock_text(passed)} passed, {clock_text(passed / done * (total - done))} left"
            print(f"[{done}/{total}, {left}] {row_text(rows[-1])}", file=sys.stderr, flush=True)
        after = ceilings(device, dtype)
        used = before.higher(after)
        report["ceilings"][name] |= {"after": vars(after), "used": vars(used)}
        for row in rows:
            add_rates(row, used)
    report["complete"] = len(report["rows"]) == total


def clock_text(seconds: float) -> str:
    """Minutes and seconds: 1:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    import torch

    from grist_eval.environment import pick_device, write_json
    from grist_tools.kernel_page import write_page

    try:
        device = pick_device(options.device)
        on_cuda = device.startswith("cuda")
        pairs = chosen_cases(chosen_ops(options.ops), options.cases or ("all" if on_cuda else "small"))
        dtypes = chosen_dtypes(options.dtypes or ("bf16" if on_cuda else "float32"))
    except ValueError as error:
        return fail("bench_kernels", error)
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)  # events and graphs are the current device's
    report = new_report(device, sys.argv[1:] if arguments is None else arguments)
    out = Path(options.out) if options.out else default_out(report["device"], datetime.date.today().isoformat())
    report["cases_planned"] = len(pairs) * len(dtypes)
    stopped = False
    try:
        write_json(report, out)  # an unusable path is found before the work, not after it
        try:
            measure(report, pairs, dtypes, device, options, lambda: write_json(report, out))
        except KeyboardInterrupt:
            stopped = True
        report["gpu_after"] = gpu_state(device)
        write_json(report, out)
        print(results_table(report["rows"]))
        written = [out, *write_page(report, out)]
    except OSError as error:
        return fail("bench_kernels", error)
    if not report["complete"]:
        print(f"stopped after {len(report['rows'])} of {report['cases_planned']} cases", file=sys.stderr)
    print(f"written to {', '.join(map(str, written))}")
    return 130 if stopped else 0 if all(row["ok"] for row in report["rows"]) else 1


if __name__ == "__main__":
    run(main)
