"""Rows of latencies as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grist_tools.console import size, table
from grist_tools.latency import MEMORY, PERCENTILES

Row = dict[str, Any]
_COLORS = ("#1f5fa8", "#d9822b", "#3a8f5c", "#a3477f")


def latency_table(rows: list[Row]) -> str:
    header = ["batch", "prompt", "output", "first ms", "p50 ms", "p90 ms", "p99 ms", "tok/s", "decode tok/s"]
    keys = ["batch", "prompt", "output", "first_token_ms", *(f"between_tokens_p{p}_ms" for p in PERCENTILES)]
    keys += ["tokens_per_second", "decode_tokens_per_second"]
    formats = ["d", "d", "d", ".2f", ".2f", ".2f", ".2f", ",.0f", ",.0f"]
    if any("decode_share_of_copy" in row for row in rows):
        header, keys, formats = (
            [*header, "of copy", "of matmul"],
            [*keys, "decode_share_of_copy", "prefill_share_of_matmul"],
            [*formats, ".0%", ".0%"],
        )
    columns = list(zip(keys, formats, strict=True))
    lines = [[_cell(row, key, how) for key, how in columns] for row in rows]
    header, lines = [*header, "memory"], [[*line, _memory(row)] for line, row in zip(lines, rows, strict=True)]
    if any("who" in row for row in rows):
        header = ["who", *header, "same ids"]
        lines = [[row["who"], *line, _cell(row, "same_ids", ".0%")] for line, row in zip(lines, rows, strict=True)]
    return table(header, lines)


def _cell(row: Row, key: str, how: str) -> str:
    return format(row[key], how) if key in row else "-"


def _memory(row: Row) -> str:
    return next((size(row[key]) for key in MEMORY if key in row), "-")


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Three panels over the grid: time to the first token, between tokens (p50, with a line up to p99), tokens a second."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((row["batch"], row["prompt"], row["output"]) for row in rows))
    who = list(dict.fromkeys(row.get("who", "") for row in rows))
    figure = Figure(figsize=(11, max(2.5, 1.2 + 0.3 * len(rows))), layout="constrained")
    panels = {
        "to the first token (ms)": "first_token_ms",
        "between tokens, p50 to p99 (ms)": "between_tokens_p50_ms",
        "tokens per second": "tokens_per_second",
    }
    for axes, (label, key) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for number, name in enumerate(who):
            mine = [row for row in rows if row.get("who", "") == name and key in row]
            at = [shapes.index((row["batch"], row["prompt"], row["output"])) for row in mine]
            height = 0.8 / len(who)
            y = [place + height * (number - (len(who) - 1) / 2) for place in at]
            values = [row[key] for row in mine]
            axes.barh(y, values, height=0.9 * height, color=_COLORS[number % len(_COLORS)], label=name or None)
            if key == "between_tokens_p50_ms":
                axes.hlines(y, values, [row["between_tokens_p99_ms"] for row in mine], color="#333333", linewidth=1)
        axes.set_xlabel(label)
        axes.set_yticks(range(len(shapes)), [f"{b} x {p} + {o}" for b, p, o in shapes])
        axes.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.invert_yaxis()
    first.set_ylabel("batch x prompt + output")
    if len(who) > 1:
        first.legend(frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
