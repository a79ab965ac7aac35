"""Check and time every op on this machine, beside whatever else computes the same.

    python -m grist_tools.bench_kernels                                   # small cases, this machine's device
    python -m grist_tools.bench_kernels --device cuda --cases large       # real sizes
    python -m grist_tools.bench_kernels --ops attention,moe --compile     # torch.compile as one more peer

A case is first compared with its reference in float64, outputs and gradients; one that is wrong is not timed, and the
command ends with status 1. Medians go to benchmarks/, with this device's own copy and matrix-product rates beside them. A
fraction of the ceiling above 100% means that the data fitted into a cache. Needs only torch.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_tools.console import fail, parser_for, run, table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from grist_kernels.cases import Arguments, Case
    from grist_tools.timing import Ceilings

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "float32": "float32"}


def parser() -> argparse.ArgumentParser:
    parser = parser_for("bench_kernels", __doc__)
    parser.add_argument("--device", default="auto", help="auto (CUDA, else CPU), cpu or cuda (default: auto)")
    parser.add_argument("--ops", metavar="A,B", help="only these ops (default: all)")
    parser.add_argument(
        "--cases",
        metavar="KIND",
        help="small, large, all, or names of cases, A,B (default: all on CUDA, small on a CPU)",
    )
    parser.add_argument("--dtypes", metavar="A,B", help="bf16, fp16, float32 (default: bf16 on CUDA, float32 on a CPU)")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the reference as one more peer")
    parser.add_argument("--no-peers", action="store_true", help="time only our own ops")
    parser.add_argument("--budget-ms", type=float, default=100.0, help="time for each median (default: %(default)s)")
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
    """(op, case) pairs: all, the small or the large ones, or those of some names. Raises ValueError if there are none."""
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
    return pairs


def check(function: Callable, op, case: Case, arguments: Arguments) -> float:
    """Largest error of a function's outputs and gradients, as a share of what is allowed: above 1 is wrong.

    A result that should be finite and is not, or has another shape or type of number, is infinitely wrong.
    """
    from grist_kernels.cases import expected, run

    got = run(function, arguments, case.gradients)
    return error_ratio(got, expected(op.reference, case, arguments))


def error_ratio(got: dict[str, Tensor], wanted: dict[str, Any]) -> float:
    """The worst of each tensor's largest error over its allowed error."""
    worst = 0.0
    for name, value in wanted.items():
        found, want = got[name].double(), value.want
        if found.shape != want.shape or not bool(found.isfinite().all()):
            return float("inf")
        error = (found - want).abs().max().item() if want.numel() else 0.0
        if error > 0:
            worst = max(worst, error / value.allowed if value.allowed else float("inf"))
    return worst


def forward_call(function: Callable, arguments: Arguments) -> Callable[[], Any]:
    """The forward as inference runs it."""
    import torch

    def call():
        with torch.no_grad():
            return function(**arguments)

    return call


def both_call(function: Callable, arguments: Arguments, gradients: tuple[str, ...]) -> Callable[[], Any]:
    """Forward and backward, against fixed random gradients of the outputs."""
    import torch

    leaves = {name: arguments[name].detach().requires_grad_() for name in gradients}
    filled = {**arguments, **leaves}
    d_outputs = [torch.randn_like(out) for out in _as_list(forward_call(function, arguments)())]

    def call():
        return torch.autograd.grad(_as_list(function(**filled)), list(leaves.values()), d_outputs)

    return call


def _as_list(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def times(function: Callable, case: Case, arguments: Arguments, device: str, budget_ms: float) -> dict[str, Any]:
    """Median times of the forward, and of forward and backward where the case has gradients."""
    from grist_tools.timing import measure

    found = {"forward": measure(forward_call(function, arguments), device, budget_ms).as_json()}
    if case.gradients:
        both = both_call(function, arguments, case.gradients)
        found["forward_backward"] = measure(both, device, budget_ms).as_json()
    return found


def bench_case(op, case: Case, dtype: torch.dtype, device: str, limits: Ceilings, options: argparse.Namespace) -> dict:
    """One row: the check, our times with their rates, and the peers' checks and times."""
    import torch

    from grist_kernels import backend
    from grist_tools.kernel_peers import peers
    from grist_tools.kernel_work import work

    arguments = case.arguments(dtype, device)
    row: dict[str, Any] = {
        "op": op.name,
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "implementation": backend.implementation(op.name, torch.device(device).type),
        "error_over_allowed": check(op.door, op, case, arguments),
    }
    row["ok"] = row["error_over_allowed"] <= 1
    if not row["ok"]:
        return row
    _free(device)
    row |= times(op.door, case, arguments, device, options.budget_ms)
    todo = work(op.name, arguments, case.gradients, _as_list(forward_call(op.door, arguments)()))
    _add_rates(row, "forward", todo.forward_bytes, todo.forward_flops, limits)
    _add_rates(row, "forward_backward", todo.both_bytes, todo.both_flops, limits)
    if not options.no_peers:
        others = peers(op, arguments, compiled=options.compile)
        row["peers"] = {name: _peer(other, op, case, arguments, device, options) for name, other in others.items()}
    return row


def _peer(other: Callable, op, case: Case, arguments: Arguments, device: str, options: argparse.Namespace) -> dict:
    """A peer's check and times. What it cannot do is written down: it must not end the measurement of our own ops."""
    try:
        found: dict[str, Any] = {"error_over_allowed": check(other, op, case, arguments)}
        _free(device)
        return found | times(other, case, arguments, device, options.budget_ms)
    except (RuntimeError, NotImplementedError, TypeError, ImportError) as error:
        _free(device)
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def _free(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _add_rates(row: dict[str, Any], key: str, n_bytes: float, flops: float, limits: Ceilings) -> None:
    """Bytes and operations a second, and how close that is to the least possible time on this device."""
    if key not in row:
        return
    seconds = row[key]["median_ms"] / 1e3
    row[key] |= {"bytes": n_bytes, "flops": flops, "gigabytes_per_second": round(n_bytes / seconds / 1e9, 3)}
    if flops:
        row[key]["teraflops"] = round(flops / seconds / 1e12, 4)
    row[key]["fraction_of_ceiling"] = round(limits.floor_ms(n_bytes, flops) / row[key]["median_ms"], 4)


def row_text(row: dict[str, Any]) -> str:
    """A finished row as one line of progress."""
    head = f"{row['op']} {row['case']} {row['dtype']}"
    if not row["ok"]:
        return f"{head}: WRONG, error {row['error_over_allowed']:.3g} of what is allowed"
    return f"{head}: {row['forward']['median_ms']:.4f} ms"


def results_table(rows: list[dict[str, Any]]) -> str:
    """Times and rates of every row, with the peers as multiples of our time (above 1 is slower than ours)."""
    header = [
        "op case",
        "type",
        "error",
        "fwd ms",
        "GB/s",
        "TFLOP/s",
        "of ceiling",
        "fwd+bwd ms",
        "of ceiling",
        "peers",
    ]

    def cells(row: dict[str, Any]) -> Iterator[str]:
        yield f"{row['op']} {row['case']}"
        yield row["dtype"]
        yield f"{row['error_over_allowed']:.2f}" if row["ok"] else "WRONG"
        for key in ("forward", "forward_backward"):
            part = row.get(key, {})
            yield _number(part.get("median_ms"), "{:.4f}")
            if key == "forward":
                yield _number(part.get("gigabytes_per_second"), "{:.1f}")
                yield _number(part.get("teraflops"), "{:.3f}")
            yield _number(part.get("fraction_of_ceiling"), "{:.0%}")
        yield ", ".join(f"{name} {_against(row, peer)}" for name, peer in row.get("peers", {}).items()) or "-"

    return table(header, [list(cells(row)) for row in rows])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _against(row: dict[str, Any], peer: dict[str, Any]) -> str:
    if "failed" in peer:
        return "failed"
    wrong = "" if peer["error_over_allowed"] <= 1 else "!"
    keys = [key for key in ("forward", "forward_backward") if key in row]
    return "/".join(f"{peer[key]['median_ms'] / row[key]['median_ms']:.2f}" for key in keys) + wrong


def default_out(device_name: str, date: str) -> Path:
    """benchmarks/kernels-DEVICE-DATE.json, numbered from the second of a day on: a committed result is never edited."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in device_name.lower())
    stem = "-".join(["kernels", *filter(None, slug.split("-")), date])
    folder = Path(__file__).parents[2] / "benchmarks"
    number, path = 1, folder / f"{stem}.json"
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


def commit() -> str | None:
    """The checkout's commit, with `+changes` where files differ from it; None outside a checkout."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        except OSError:  # no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    return f"{head}+changes" if head and git("status", "--porcelain", "--untracked-files=no") else head


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    import torch

    from grist_eval.environment import pick_device, provenance, write_json
    from grist_tools.timing import ceilings

    try:
        device = pick_device(options.device)
        on_cuda = device.startswith("cuda")
        pairs = chosen_cases(chosen_ops(options.ops), options.cases or ("all" if on_cuda else "small"))
        names = (options.dtypes or ("bf16" if on_cuda else "float32")).split(",")
        if unknown := [name for name in names if name not in DTYPES]:
            raise ValueError(f"unknown type(s) {', '.join(unknown)}; there are {', '.join(DTYPES)}")
    except ValueError as error:
        return fail("bench_kernels", error)

    rows, limits_of = [], {}
    for dtype_name in names:
        dtype = getattr(torch, DTYPES[dtype_name])
        limits = ceilings(device, dtype)
        limits_of[DTYPES[dtype_name]] = vars(limits)
        for number, (op, case) in enumerate(pairs, start=1):
            rows.append(bench_case(op, case, dtype, device, limits, options))
            print(f"[{number}/{len(pairs)}] {row_text(rows[-1])}", file=sys.stderr, flush=True)
    print(results_table(rows))
    where = provenance(device)
    report = {
        "what": "kernels",
        "command": ["python", "-m", "grist_tools.bench_kernels", *(sys.argv[1:] if arguments is None else arguments)],
        "commit": commit(),
        **where,
        "threads": torch.get_num_threads(),
        "ceilings": limits_of,
        "rows": rows,
    }
    out = Path(options.out) if options.out else default_out(where["device"], datetime.date.today().isoformat())
    try:
        write_json(report, out)
    except OSError as error:
        return fail("bench_kernels", error)
    print(f"written to {out}")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    run(main)
