"""Write the kernels' launch tables: block sizes and warps for each architecture, type and size. Nothing else tunes.

    python -m grist_tools.tune_kernels                              # time every candidate on this machine's GPU
    python -m grist_tools.tune_kernels --ops rms_norm --dtypes bfloat16 --rows 32768
    python -m grist_tools.tune_kernels --formula                    # no GPU: what the ops' formulas say, for all

A candidate is timed only after it agreed with the float64 reference, and is kept only if it beats the op's formula by more than
2%, twice. Rows for other architectures stay as they are. --formula renews every row that nobody measured; so does tuning. The
command ends with status 1 if a candidate gave a wrong result. Ctrl-C keeps the ops that are done.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from grist_tools.console import fail, parser_for, run

DTYPES = ("bfloat16", "float32")
FORMULA = "formula"  # the source of a row that was not measured

Row = dict[str, Any]  # kernel, architecture, dtype, size, config, source


def parser() -> argparse.ArgumentParser:
    parser = parser_for("tune_kernels", __doc__)
    parser.add_argument("--ops", metavar="A,B", help="only these ops (default: all that have a launch table)")
    parser.add_argument(
        "--dtypes", metavar="A,B", default=",".join(DTYPES), help="types to time (default: %(default)s)"
    )
    parser.add_argument(
        "--rows", type=int, default=16384, help="rows (tokens) of the timed calls (default: %(default)s)"
    )
    parser.add_argument("--budget-ms", type=float, default=100.0, help="time for each median (default: %(default)s)")
    parser.add_argument("--formula", action="store_true", help="time nothing: write what the formulas say")
    parser.add_argument(
        "--into", metavar="FOLDER", help="write FOLDER/OP/launch_table.json (default: into the package)"
    )
    return parser


def key(row: Row) -> tuple[str, str, str, int]:
    """What a row is for: no two of a table have the same."""
    return row["kernel"], row["architecture"], row["dtype"], row["size"]


def formula_rows(op: str) -> list[Row]:
    """Every row that an op's table has, as its formulas fill it. Imports Triton; launches nothing."""
    import torch

    from grist_tools.kernel_recorder import GPUS

    module = import_module(f"grist_kernels.{op}.triton_kernel")
    return [
        {
            "kernel": kernel,
            "architecture": gpu.architecture,
            "dtype": dtype,
            "size": size,
            "config": dict(formula(gpu, getattr(torch, dtype), size)),
            "source": FORMULA,
        }
        for kernel, formula in module.FORMULAS.items()
        for gpu in GPUS.values()
        for dtype in DTYPES
        for size in module.SIZES
    ]


def merged(formulas: list[Row], before: list[Row], measured: list[Row]) -> list[Row]:
    """A whole table: new measurements, else those there were before, else the formulas. A measurement of what the op no longer
    has (a size, a kernel) is dropped."""
    rows = {key(row): row for row in formulas}
    for row in (*(row for row in before if row["source"] != FORMULA), *measured):
        if key(row) in rows:
            rows[key(row)] = row
    return list(rows.values())


def table_text(rows: list[Row]) -> str:
    """A launch table as JSON, a line for each row, so that a change shows as the lines it changes."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"rows": [\n{lines}\n]}}\n'


def write_table(op: str, measured: list[Row], folder: Path | None) -> Path:
    """Write an op's table with these measurements, whole or not at all; the path."""
    from grist_data.atomic import write_atomically
    from grist_kernels import launch

    path = launch.table_path(op) if folder is None else folder / op / launch.table_path(op).name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = table_text(merged(formula_rows(op), launch.table(op), measured))
    write_atomically(path, text.encode())
    launch.forget()
    return path


def chosen_dtypes(names: str) -> list[str]:
    """Raises ValueError for a type that tables have no rows for."""
    if unknown := [name for name in names.split(",") if name not in DTYPES]:
        raise ValueError(f"no rows for type(s) {', '.join(unknown)}; tables have {', '.join(DTYPES)}")
    return names.split(",")


def check_can_measure() -> None:
    """Raises ValueError where nothing can be timed, or where tables have no rows for the GPU."""
    import torch

    from grist_kernels import launch
    from grist_tools.kernel_recorder import GPUS

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1: interpreted kernels have no times worth having; unset it")
    if not torch.cuda.is_available():
        raise ValueError("tuning times kernels on a GPU, and there is none; --formula needs none")
    architecture = launch.target(torch.device("cuda")).architecture
    if architecture not in GPUS:
        raise ValueError(f"this GPU is {architecture}, but tables are for {', '.join(GPUS)}; it runs by the formulas")


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from grist_tools.kernel_recorder import ops_with_tables

    folder = Path(options.into) if options.into else None
    wrong = 0
    try:
        ops, dtypes = ops_with_tables(options.ops), chosen_dtypes(options.dtypes)
        if not options.formula:
            check_can_measure()
        for op in ops:
            rows: list[Row] = []
            if not options.formula:
                from grist_tools.tune_kernels_measure import tune

                rows, wrong_here = tune(op, dtypes, options.rows, options.budget_ms, "cuda")
                wrong += wrong_here
            print(write_table(op, rows, folder), flush=True)
    except (OSError, ValueError) as error:
        return fail("tune_kernels", error)
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
