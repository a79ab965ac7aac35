"""What the data benchmark writes and prints: the report's head, and its rows as a table."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from grist_tools.bench_kernels import commit
from grist_tools.console import count, size, table

if TYPE_CHECKING:
    from grist_tools.bench_data_turns import Row

HOW = {
    "check": "x and y of 20 steps against the files read by numpy.fromfile, document borders against doc_ends, shares of the"
    " mixture against its weights, the resumed batch against the uninterrupted one, ids of text against tokenizers alone",
    "rates": "tokens of a slice over its whole time; value: median over rounds, contestants in turns",
    "per_cpu_second": "the same by processor time, over all threads: what other work on the machine does not change as much",
    "p50_ms, p99_ms": "of single batches, over all rounds",
    "copy": "torch copy of as many bytes as x and y have, from cache to cache",
    "own memory": "most RssAnon in a fresh process above what it was before the dataset was opened, batches included",
    "start": "from nothing open to the first batch, files in the page cache; resume: ten epochs on",
    "cold": "files dropped from the page cache before each round; time counts from opening on",
    "text": "all of prepare, from a .jsonl to a finished dataset; target: 90% of tokenizers alone in the same run",
}


def new_report(options: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """The report before anything was measured."""
    import torch

    from grist_eval.environment import provenance

    return {
        "what": "data",
        "command": ["python", "-m", "grist_tools.bench_data", *command],
        "commit": commit(),
        **provenance("cpu"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "sequence_length": options.sequence_length,
        "batch": options.batch,
        "how": HOW,
        "complete": False,
        "rows": [],
    }


def value_text(row: Row, key: str = "value") -> str:
    """A value in its unit: 512 M tokens/s."""
    if row.get(key) is None:
        return "-"
    if row["unit"] == "bytes":
        return size(row[key])
    return f"{count(row[key])} {row['unit']}" if row["unit"] == "tokens/s" else f"{row[key]:.3g} {row['unit']}"


def results_table(rows: list[Row]) -> str:
    """Rows for a terminal; what is wrong or could not be measured says why below."""
    header = ["what", "who", "value", "target", "reached", "p50 ms", "p99 ms", "by CPU time"]
    cells, notes = [], []
    for row in rows:
        if why := row.get("wrong") or row.get("why"):
            notes.append(f"{row['what']}, {row['who']}: {why}")
        reached = {True: "yes", False: "no", None: "-"}[row.get("reached")]
        p50, p99 = (f"{row[key]:.3f}" if key in row else "-" for key in ("p50_ms", "p99_ms"))
        value, target = (value_text(row), value_text(row, "target")) if row["ok"] else ("WRONG", "-")
        cells.append([row["what"], row["who"], value, target, reached, p50, p99, value_text(row, "per_cpu_second")])
    return "\n".join([table(header, cells), *notes])
