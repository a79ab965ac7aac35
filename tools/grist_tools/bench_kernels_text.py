"""Rows of a kernels report in words and cells, and our times against a peer's: for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from grist_tools.console import table

DIRECTIONS = {"forward": "forward", "backward": "backward", "forward_backward": "both"}
EVEN = 0.05  # times that differ by less than this share are called even

Row = dict[str, Any]


class Comparison(NamedTuple):
    """One peer in one direction of one case; ratio is its time over ours, above 1 where ours is faster."""

    row: Row
    direction: str
    peer: str
    ours_ms: float
    peer_ms: float
    by_graph: bool

    @property
    def ratio(self) -> float:
        return self.peer_ms / self.ours_ms


def compare(row: Row) -> Iterator[Comparison]:
    """Like with like: CUDA graphs where both have one, else both medians."""
    for direction in DIRECTIONS:
        for name, peer in row.get("peers", {}).items():
            if direction in row and direction in peer:
                ours, theirs = row[direction], peer[direction]
                key = "graph_ms" if "graph_ms" in ours and "graph_ms" in theirs else "median_ms"
                yield Comparison(row, direction, name, ours[key], theirs[key], key == "graph_ms")


def share(part: dict[str, Any]) -> float | None:
    """The fraction of the ceiling that says most about the device: of the graph's time where there is one."""
    return part.get("graph_fraction_of_ceiling", part.get("fraction_of_ceiling"))


def share_text(part: dict[str, Any]) -> str:
    """A share beside its target: 94% (of 92%), or 81% < 92%."""
    found, target = share(part), part.get("target")
    if found is None:
        return "-"
    if target is None:
        return f"{found:.0%}"
    return f"{found:.1%} ({target:.0%})" if found >= target else f"{found:.1%} < {target:.0%}"


def row_text(row: Row) -> str:
    """A finished row as one line of progress."""
    head = f"{row['op']} {row['case']} {row['dtype']}"
    if not row["ok"]:
        return f"{head}: WRONG, {why(row)}"
    return f"{head}: {row['forward']['median_ms']:.4f} ms"


def why(found: dict[str, Any]) -> str:
    return found["failed"] if "failed" in found else f"error {found['error_over_allowed']:.3g} of what is allowed"


def results_table(rows: list[Row]) -> str:
    """Times and shares of every row for a terminal, with the peers as multiples of our time (above 1: slower than ours)."""
    header = ["op case", "type", "error", "fwd ms", "ceiling", "bwd ms", "ceiling", "both ms", "peers fwd/bwd/both"]

    def cells(row: Row) -> Iterator[str]:
        yield f"{row['op']} {row['case']}"
        yield row["dtype"]
        yield f"{row['error_over_allowed']:.2f}" if row["ok"] else "WRONG"
        for direction in ("forward", "backward"):
            part = row.get(direction, {})
            yield f"{part['median_ms']:.4f}" if part else "-"
            yield share_text(part)
        both = row.get("forward_backward")
        yield f"{both['median_ms']:.4f}" if both else "-"
        yield ", ".join(_peer_text(row, name) for name in row.get("peers", {})) or "-"

    return table(header, [list(cells(row)) for row in rows])


def _peer_text(row: Row, name: str) -> str:
    if not row["peers"][name]["ok"]:
        return f"{name} {'failed' if 'failed' in row['peers'][name] else 'wrong'}"
    return f"{name} {'/'.join(f'{found.ratio:.2f}' for found in compare(row) if found.peer == name)}"
