"""The picture of a kernels report: a roofline of what multiplies matrices, and the share of the copy rate of what only moves.

Drawn without pyplot, as SVG with its text as text: small, and the same bytes for the same report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS = "ours"
OUR_COLOR, OUR_BAR = "#1f5fa8", "#a9c6e8"
OTHER_COLORS = ("#d9822b", "#3a8f5c", "#a3477f", "#7a7a7a", "#b3a12b")
MARKERS = ("o", "s", "^", "D", "v", "P")


class Point(NamedTuple):
    """One contestant in one direction of one case."""

    label: str
    contestant: str
    dtype: str
    milliseconds: float
    n_bytes: float
    flops: float
    target: float | None


def points(report: dict[str, Any]) -> list[Point]:
    """Forward and backward of the large cases; of all where there are no large ones. Graph times where all have them."""
    rows = [row for row in report["rows"] if row["ok"]]
    rows = [row for row in rows if row["large"]] or rows
    several = len({row["dtype"] for row in rows}) > 1
    found = []
    for row in rows:
        for direction in ("forward", "backward"):
            if direction not in row:
                continue
            ours = row[direction]
            parts = {OURS: ours}
            parts |= {name: peer[direction] for name, peer in row.get("peers", {}).items() if direction in peer}
            key = "graph_ms" if all("graph_ms" in part for part in parts.values()) else "median_ms"
            label = f"{row['op']} {row['case']} {row['dtype'] + ' ' if several else ''}{direction}"
            found += [
                Point(label, name, row["dtype"], part[key], ours["bytes"], ours["flops"], ours.get("target"))
                for name, part in parts.items()
            ]
    return found


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture. The report must hold a row that was timed."""
    found = points(report)
    moving, multiplying = [p for p in found if not p.flops], [p for p in found if p.flops]
    labels = list(dict.fromkeys(point.label for point in moving))
    styles = _styles(found)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gristmill", "font.size": 8}):
        tall = max(4.0, 1.2 + 0.17 * len(labels))
        panels = [panel for panel in (multiplying, moving) if panel]
        figure = Figure(figsize=(6.5 * len(panels), tall), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            if panel is multiplying:
                _roofline(axes, panel, report["ceilings"], styles)
            else:
                _shares(axes, panel, labels, report["ceilings"], styles)
        figure.suptitle(f"{report['device']}, {report['date'][:10]}, commit {(report['commit'] or 'unknown')[:10]}")
        figure.savefig(path, format="svg", metadata={"Date": None})


def _styles(found: list[Point]) -> dict[str, dict[str, Any]]:
    names = list(dict.fromkeys([OURS, *(point.contestant for point in found)]))
    colors = [OUR_COLOR, *(OTHER_COLORS[i % len(OTHER_COLORS)] for i in range(len(names) - 1))]
    return {
        name: {"color": color, "marker": MARKERS[i % len(MARKERS)], "linestyle": "none", "markersize": 4}
        for i, (name, color) in enumerate(zip(names, colors, strict=True))
    }


def _roofline(axes: Axes, found: list[Point], ceilings: dict[str, Any], styles: dict[str, dict[str, Any]]) -> None:
    """Achieved TFLOP/s over FLOPs a byte, both logarithmic, under this run's ceilings."""
    intensities = [point.flops / point.n_bytes for point in found]
    ridges = [
        found["used"]["matmul_flops_per_second"] / found["used"]["copy_bytes_per_second"] for found in ceilings.values()
    ]
    edges = (min(intensities + ridges) / 2, max(intensities + ridges) * 2)
    for dtype in dict.fromkeys(point.dtype for point in found):
        used = ceilings[dtype]["used"]
        copy, product = used["copy_bytes_per_second"], used["matmul_flops_per_second"]
        xs = (edges[0], product / copy, edges[1])
        axes.plot(xs, [min(x * copy, product) / 1e12 for x in xs], color="black", linewidth=1)
        axes.annotate(f"{dtype} {product / 1e12:.3g} TFLOP/s", (edges[1], product / 1e12), ha="right", va="bottom")
    for name, style in styles.items():
        own = [point for point in found if point.contestant == name]
        if own:
            rates = [point.flops / point.milliseconds / 1e9 for point in own]
            axes.plot([point.flops / point.n_bytes for point in own], rates, label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte (least amounts)", ylabel="achieved TFLOP/s")
    axes.set_title("matrix products, under the roofline")
    axes.legend()


def _shares(
    axes: Axes, found: list[Point], labels: list[str], ceilings: dict[str, Any], styles: dict[str, dict[str, Any]]
) -> None:
    """Achieved bytes a second as a share of this run's copy: ours as bars, peers as marks, targets as ticks."""
    for name, style in styles.items():
        own = [point for point in found if point.contestant == name]
        if not own:
            continue
        heights = [labels.index(point.label) for point in own]
        shares = [100 * _share(point, ceilings) for point in own]
        if name == OURS:
            axes.barh(heights, shares, height=0.7, color=OUR_BAR, label=name)
        else:
            axes.plot(shares, heights, label=name, **style)
    aims = [
        (100 * point.target, labels.index(point.label)) for point in found if point.target and point.contestant == OURS
    ]
    if aims:
        axes.plot(*zip(*aims, strict=True), "|", color="black", markersize=8, label="target")
    axes.axvline(100, color="black", linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="achieved bytes a second, % of copy", xlim=(0, None), title="only moving memory")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.05), ncols=6)


def _share(point: Point, ceilings: dict[str, Any]) -> float:
    return point.n_bytes / (point.milliseconds / 1e3) / ceilings[point.dtype]["used"]["copy_bytes_per_second"]
