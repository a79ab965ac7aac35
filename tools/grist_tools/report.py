"""A run as one page to read: figures, curves, the router's health, bad batches, samples, settings.

python -m grist_tools.report runs/quickstart                    # writes runs/quickstart/report.html
python -m grist_tools.report runs/a runs/b --out both.html      # over each other, with what differs in their settings

The page needs nothing but itself: no network, no script to be read, any width, light and dark. A run may still be going on.
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path

from grist_tools.console import fail, parser_for, run, size


def write(text: str, path: Path) -> Path:
    """Write a file whole or not at all: under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def report(folders: list[str], out: str | None) -> Path:
    """Read the runs and write their page; `out` is report.html in the folder of the first when None."""
    from grist_tools.report_page import page
    from grist_tools.report_run import read_runs

    # A long run is millions of values that all stay: looking for garbage among them takes a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        runs = read_runs(folders)
        return write(page(runs), Path(out) if out else runs[0].folder / "report.html")
    finally:
        if collecting:
            gc.enable()


def parser() -> argparse.ArgumentParser:
    parser = parser_for("report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or the metrics.jsonl in it")
    parser.add_argument("--out", metavar="HTML", help="page to write (default for one run: report.html in its folder)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if len(options.runs) > 1 and not options.out:
            raise ValueError("several runs on one page need --out FILE.html")
        path = report(options.runs, options.out)
        print(f"{path} ({size(path.stat().st_size)})")
    except (ValueError, OSError) as error:
        return fail("report", error)
    return 0


if __name__ == "__main__":
    run(main)
