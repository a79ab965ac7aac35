"""The page of `grist_data.inspect`: one HTML file that needs nothing else, its plots as SVG inside."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from grist_data.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from grist_data.inspect import SplitReport

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ white-space: pre-wrap; font-size: 0.85rem }} svg {{ width: 100%; height: auto }}</style></head>
<body><h1>{title}</h1>
"""
_BINS = 40


def write_page(path: Path, title: str, text: str, reports: dict[str, SplitReport]) -> None:
    """Write the page, whole or not at all. text: the report as printed. Equal datasets give equal bytes."""
    plots = _svg(reports)
    body = f"{plots}\n<pre>{html.escape(text)}</pre>\n</body></html>\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (_HEAD.format(title=html.escape(title)) + body).encode())


def _svg(reports: dict[str, SplitReport]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    counted = any(found.counts is not None for found in reports.values())
    with matplotlib.rc_context({"svg.hashsalt": "gristmill", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(11, 4) if counted else (6, 4), layout="constrained")
        axes = figure.subplots(1, 2 if counted else 1, squeeze=False)[0]
        _plot_lengths(axes[0], reports)
        if counted:
            _plot_frequencies(axes[1], reports)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    drawn = file.getvalue()
    return drawn[drawn.index("<svg") :]  # without the XML declaration, which has no place inside HTML


def _plot_lengths(axes: Axes, reports: dict[str, SplitReport]) -> None:
    longest = max(found.lengths.quantile(1) for found in reports.values())
    edges = np.geomspace(1, longest + 1, _BINS + 1)
    for name, found in reports.items():
        axes.stairs(found.lengths.histogram(edges) / found.lengths.n_docs, edges, label=name, fill=True, alpha=0.5)
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="share of documents", title="Lengths of documents")
    axes.legend()


def _plot_frequencies(axes: Axes, reports: dict[str, SplitReport]) -> None:
    """Share of the tokens by rank, thinned out: a straight line is Zipf's law."""
    for name, found in reports.items():
        if found.counts is not None:
            ordered = np.sort(found.counts[found.counts > 0])[::-1] / found.counts.sum()
            ranks = np.unique(np.geomspace(1, len(ordered), 200).astype(np.int64))
            axes.plot(ranks, ordered[ranks - 1], label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="rank of the token", ylabel="share of tokens", title="Token frequencies"
    )
    axes.legend()
