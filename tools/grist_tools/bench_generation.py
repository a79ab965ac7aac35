"""Check and time generation on this CPU, beside transformers: one prompt, greedy, float32, the same weights.

    python -m grist_tools.bench_generation                      # a dense model and a mixture of experts
    python -m grist_tools.bench_generation --models dense --repetitions 15

Every contestant first writes the text once; one whose ids are not those of transformers with a static cache is not timed, and
if it is ours the command ends with status 1. Then they take turns. A repetition counts only if other processes left the
machine alone meanwhile (Linux); --patience bounds the wait. A JSON goes to benchmarks/.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from grist_tools.bench_generation_peers import BASE, OURS
from grist_tools.console import fail, parser_for, run, table
from grist_tools.quiet import QUIET_CORES, cores_of_others, usage, wait_until_quiet

if TYPE_CHECKING:
    from grist_tools.bench_generation_peers import Contestant, Text

MODELS = ("dense", "moe")
# Times as fast as transformers with a static cache.
TARGETS = {("dense", "prefill"): 1.1, ("moe", "prefill"): 1.1, ("dense", "decode"): 2.0, ("moe", "decode"): 3.0}
HOW = {
    "check": "the same greedy ids as transformers with a static cache",
    "prefill": "from the call to the first id; tokens of the prompt a second",
    "decode": "from the first id to the last; ids a second",
    "value": "of the median repetition; contestants in turns, another one first each time",
    "quiet": f"how many repetitions count: those with less than {QUIET_CORES} cores in use by other processes. "
    "0: none was so quiet, and all count; null: this machine does not say",
    "native": "whether the kernels in C were there (GRIST_NATIVE); without them a step runs in PyTorch alone",
    "ratio": f"to {BASE}",
}

Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    parser = parser_for("bench_generation", __doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64 (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--prompt", type=int, default=256, help="tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=128, help="tokens after the first (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=9, help="of each contestant (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait in all (default: %(default)s)")
    parser.add_argument("--out", metavar="JSON", help="default: benchmarks/generation-DEVICE-DATE.json")
    return parser


def check_options(options: argparse.Namespace) -> list[str]:
    """-> the models asked for. Raises ValueError for options that make no benchmark."""
    models = options.models.split(",")
    if strays := set(models) - set(MODELS):
        raise ValueError(f"--models must be some of {', '.join(MODELS)}, but has {', '.join(sorted(strays))}")
    for name in ("layers", "width", "vocab_size", "prompt", "new", "repetitions"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, but is {getattr(options, name)}")
    if options.width % 64:
        raise ValueError(f"--width must be a multiple of 64, but is {options.width}")
    return models


def race(
    contestants: Mapping[str, Contestant], prompt: list[int], count: int, repetitions: int, until: float
) -> list[Row]:
    """Rows for prefill and decode of every contestant. until: how long to wait for quiet, on time.perf_counter()."""
    checked = {name: write(prompt, count).ids for name, write in contestants.items()}
    right = [name for name, ids in checked.items() if ids == checked[BASE]]
    texts: dict[str, list[tuple[Text, float | None]]] = {name: [] for name in right}
    for number in range(repetitions):
        first = number % len(right)
        for name in right[first:] + right[:first]:
            texts[name].append(quiet_text(contestants[name], prompt, count, until))
    rows = []
    for what, tokens in (("prefill", len(prompt)), ("decode", 1)):
        base_ms = timings(texts[BASE], what, tokens)["ms"]
        for name, ids in checked.items():
            if name in right:
                row = timings(texts[name], what, tokens)
                row["ratio"] = base_ms / row["ms"]
            else:
                at = next(i for i, (a, b) in enumerate(zip(ids, checked[BASE], strict=True)) if a != b)
                row = {"ok": False, "wrong": f"id {at} is {ids[at]}, but {BASE} has {checked[BASE][at]}"}
            rows.append({"what": what, "who": name, **row})
    return rows


def quiet_text(write: Contestant, prompt: list[int], count: int, until: float) -> tuple[Text, float | None]:
    """A text, and how many cores others used meanwhile. One that was disturbed is written again, as long as there is time."""
    while True:
        wait_until_quiet(until)
        before = usage()
        text = write(prompt, count)
        others = cores_of_others(before, usage())
        if others is None or others <= QUIET_CORES or time.perf_counter() >= until:
            return text, others


def timings(texts: list[tuple[Text, float | None]], what: str, tokens: int) -> Row:
    known = [others for _, others in texts if others is not None]
    quiet = [text for text, others in texts if others is None or others <= QUIET_CORES]
    ms = sorted(
        text.first_ms if what == "prefill" else text.between_ms for text in quiet or [text for text, _ in texts]
    )
    return {
        "ok": True,
        "unit": "tokens/s",
        "value": 1e3 * tokens / median(ms),
        "ms": median(ms),
        "lowest_ms": ms[0],
        "highest_ms": ms[-1],
        "repetitions": len(texts),
        "quiet": len(quiet) if known else None,
    }


def judged(row: Row, kind: str) -> Row:
    """A row of ours beside its target."""
    row = {"model": kind, **row}
    if row["who"] != OURS or not row["ok"]:
        return row
    target = TARGETS[kind, row["what"]]
    return {**row, "target": target, "reached": row["ratio"] >= target}


def results_table(rows: list[Row]) -> str:
    header = ["model", "what", "who", "tokens/s", "ms", "ratio", "target", "reached", "quiet"]
    cells, notes = [], []
    for row in rows:
        names = [row["model"], row["what"], row["who"]]
        if not row["ok"]:
            notes.append(f"{', '.join(names)}: {row['wrong']}")
            cells.append([*names, "WRONG", "-", "-", "-", "-", "-"])
            continue
        target, reached = row.get("target"), {True: "yes", False: "no", None: "-"}[row.get("reached")]
        quiet = "-" if row["quiet"] is None else f"{row['quiet']}/{row['repetitions']}"
        numbers = [f"{row['value']:,.0f}", f"{row['ms']:.2f}", f"{row['ratio']:.2f}"]
        cells.append([*names, *numbers, "-" if target is None else f"{target:.1f}", reached, quiet])
    return "\n".join([table(header, cells), *notes])


def new_report(options: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    import importlib.metadata

    import torch

    from grist_eval.environment import provenance
    from grist_kernels import describe, native
    from grist_tools.bench_kernels import commit

    where = provenance("cpu")
    where["versions"]["transformers"] = importlib.metadata.version("transformers")
    settings = ("layers", "width", "vocab_size", "prompt", "new", "repetitions", "patience")
    return {
        "what": "generation",
        "command": ["python", "-m", "grist_tools.bench_generation", *command],
        "commit": commit(),
        **where,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": describe("cpu"),
        "native": native.available(),
        **{name: getattr(options, name) for name in settings},
        "how": HOW,
        "rows": [],
    }


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    import torch

    from grist_eval.environment import write_json
    from grist_tools.bench_generation_peers import contestants
    from grist_tools.bench_kernels import default_out

    try:
        models = check_options(options)
        prompt = torch.randint(1, options.vocab_size, (options.prompt,), generator=torch.Generator().manual_seed(1))
        context = options.prompt + options.new + 1
        shape = (options.layers, options.width, options.vocab_size, context)
        first = contestants(models[0], *shape)  # an unusable setting is found before the report is made
        report = new_report(options, sys.argv[1:] if arguments is None else arguments)
        today = datetime.date.today().isoformat()
        out = Path(options.out) if options.out else default_out(report["device"], today, "generation")
        until = time.perf_counter() + options.patience
        for kind in models:
            found = first if kind == models[0] else contestants(kind, *shape)
            rows = race(found, prompt.tolist(), options.new + 1, options.repetitions, until)
            report["rows"] += [judged(row, kind) for row in rows]
        write_json(report, out)
    except (ValueError, ImportError, OSError) as error:
        return fail("bench_generation", error)
    print(results_table(report["rows"]))
    print(f"written to {out}")
    return 0 if all(row["ok"] for row in report["rows"] if row["who"] == OURS) else 1


if __name__ == "__main__":
    run(main)
