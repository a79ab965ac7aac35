"""What every command line here shares: how `--help` looks, how a fault is told, how a table is set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


def parser_for(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help opens with the module's own docstring, examples included."""
    return argparse.ArgumentParser(
        prog=f"python -m grist_tools.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def fail(name: str, error: BaseException) -> int:
    """Tell on stderr what is wrong with the input; the exit status to end with (2, as argparse uses)."""
    print(f"{name}: {error}", file=sys.stderr)
    return 2


def run(main: Callable[[], int]) -> NoReturn:
    """End the process with what `main` returns; Ctrl-C ends it quietly (status 130, as shells have it)."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first set left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def size(n_bytes: float) -> str:
    """Bytes in binary units, three significant figures: `1.50 GiB`."""
    value, units = float(n_bytes), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.{max(0, 2 - (value >= 10) - (value >= 100))}f} {units[0]}"


def count(n: float) -> str:
    """A number in powers of a thousand, three significant figures: `20.9 B`."""
    value, units = float(n), ["", " k", " M", " B", " T", " P", " E"]
    while abs(value) >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    digits = 0 if not units[0] else max(0, 2 - (value >= 10) - (value >= 100))
    return f"{value:.{digits}f}{units[0]}"
