"""Check and time multiple choice by likelihood on this CPU, beside lm_eval: the same weights, rows and prompts, float32.

    python -m grist_tools.bench_eval                            # a dense model and a mixture of experts
    python -m grist_tools.bench_eval --models dense --tasks hellaswag,mmlu:5 --rows 100

TASK:N asks with N examples before each question. Timed is what both do from texts to log-likelihoods, tokenization included:
`LM.loglikelihood` of lm_eval's `hf` model (transformers), and ours. All log-likelihoods of a task are first held against each
other; where one differs, the task is not timed, and the command ends with status 1. Then they take turns, lm_eval once for each
batch size. A repetition counts only if other processes left the machine alone meanwhile (Linux); --patience bounds the wait.
A JSON goes to benchmarks/.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from grist_tools.console import fail, parser_for, run, table
from grist_tools.quiet import QUIET_CORES, cores_of_others, usage, wait_until_quiet

MODELS = ("dense", "moe")
TASKS = "hellaswag,arc_easy,piqa,winogrande,boolq,openbookqa,sciq,commonsense_qa,lambada_openai,mmlu:5"
OURS = "grist_eval"
TARGET = 2.0  # times as fast as lm_eval's best, over all tasks
TOLERANCE_NATS = 2e-3  # of sums over tens of tokens of 8 nats each; both round in float32
HOW = {
    "check": f"every log-likelihood within {TOLERANCE_NATS} nats of lm_eval's, and greedy where it says so",
    "value": "rows a second, from texts to log-likelihoods, of the median repetition; contestants in turns",
    "quiet": f"how many repetitions count: those with less than {QUIET_CORES} cores in use by other processes. "
    "0: none was so quiet, and all count; null: this machine does not say",
    "ratio": "to the fastest lm_eval of the task; of `all`, to the fastest over all tasks",
    "cpu_ratio": "the same of processor time, of all threads: what is left to compare where others disturb",
}

Row = dict[str, Any]
# Pairs of (context, continuation) to (log-likelihood, greedy) of each.
Contestant = Callable[[Sequence[tuple[str, str]]], list[tuple[float, bool]]]


def parser() -> argparse.ArgumentParser:
    parser = parser_for("bench_eval", __doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--tasks", default=TASKS, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=100, help="of each task (default: %(default)s)")
    parser.add_argument("--batch-sizes", default="1,16", help="of lm_eval, in requests (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64 (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=3, help="of each contestant (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait in all (default: %(default)s)")
    parser.add_argument("--out", metavar="JSON", help="default: benchmarks/eval-DEVICE-DATE.json")
    return parser


def check_options(options: argparse.Namespace) -> tuple[list[str], list[tuple[str, int]], list[int]]:
    """-> (models, (task, examples) of each task, batch sizes). Raises ValueError for options that make no benchmark."""
    from grist_tools.bench_eval_peers import PARITY_TASKS

    models = options.models.split(",")
    if strays := set(models) - set(MODELS):
        raise ValueError(f"--models must be some of {', '.join(MODELS)}, but has {', '.join(sorted(strays))}")
    tasks = []
    for each in options.tasks.split(","):
        name, _, shots = each.partition(":")
        if name not in PARITY_TASKS or not (shots or "0").isdigit():
            raise ValueError(
                f"--tasks must be some of {', '.join(PARITY_TASKS)}, each perhaps with :N, but has {each!r}"
            )
        tasks.append((name, int(shots or "0")))
    sizes = options.batch_sizes.split(",")
    if not all(size.isdigit() and int(size) for size in sizes):
        raise ValueError(f"--batch-sizes must be whole numbers above 0, but is {options.batch_sizes!r}")
    for name in ("layers", "width", "vocab_size", "rows", "repetitions"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, but is {getattr(options, name)}")
    if options.width % 64:
        raise ValueError(f"--width must be a multiple of 64, but is {options.width}")
    return models, tasks, [int(size) for size in sizes]


def pairs_of(folder: Path, name: str, shots: int, rows: int) -> list[tuple[str, str]]:
    """All (context, continuation) pairs of invented rows of a task."""
    from grist_eval.questions import Settings, load_questions
    from grist_tools.bench_eval_rows import write_rows

    data = {name: write_rows(folder / "rows", name, rows)}
    examples = {name: write_rows(folder / "examples", name, 40, seed=5)}
    questions = load_questions([name], data=data, examples=examples, settings=Settings(shots=shots))[0]
    return [pair for at in range(rows) for pair in questions.pairs(at)]


def contestants(kind: str, options: argparse.Namespace, sizes: Sequence[int], folder: Path) -> dict[str, Contestant]:
    """By name, on one model directory that is made in folder. Raises ImportError without lm_eval."""
    import grist_model
    from grist_data import Tokenizer
    from grist_data.tokenizer_training import train_bpe
    from grist_tools import bench_eval_peers
    from grist_tools.bench_eval_rows import invented_text

    tokenizer = train_bpe([invented_text()], 2048)
    model = grist_model.build(_config(kind, options))
    grist_model.save(model, folder, tokenizer=tokenizer)
    model, tokenizer = grist_model.load(folder), Tokenizer.load(folder)
    lm = bench_eval_peers.transformers_lm(folder, sizes[0])
    return {
        OURS: _ours(model, tokenizer),
        **{f"lm_eval hf, batch {size}": _lm_eval(lm, size) for size in sizes},
    }


def _config(kind: str, options: argparse.Namespace) -> Any:
    """A Llama, or a Qwen3-MoE of 32 experts, 4 of them active; wide initial weights, so that predictions differ."""
    from grist_model import ModelConfig

    dense = {"experts": 0, "expert_width": options.width * 11 // 4}
    moe = {"experts": 32, "active_experts": 4, "expert_width": options.width // 2, "qk_norm": "head"}
    heads = options.width // 64
    return ModelConfig(
        vocab_size=options.vocab_size, context_length=2048, layers=options.layers, width=options.width, heads=heads,
        kv_heads=heads, attention_bias=False, sinks=False, window=None, window_layers="none", mlp_bias=False,
        router_bias=False, swiglu_alpha=None, swiglu_limit=None, initializer_range=0.04,
        **(dense if kind == "dense" else moe),
    )  # fmt: skip


def _ours(model: Any, tokenizer: Any) -> Contestant:
    from grist_eval.encoding import encode_pairs
    from grist_eval.scoring import Score, plan, score_groups

    def score(pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        encoded = encode_pairs(tokenizer, pairs, model.config.context_length)
        by_context: dict[str, list[int]] = {}
        for at, (context, _) in enumerate(pairs):
            by_context.setdefault(context, []).append(at)
        places = list(by_context.values())
        groups = [[encoded[at] for at in group] for group in places]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)

        def done(group: int, scores: list[Score]) -> None:
            for at, each in zip(places[group], scores, strict=True):
                found[at] = (each.log_likelihood, each.greedy)

        score_groups(model, groups, plan(groups, model.config.vocab_size), done=done)
        return found

    return score


def _lm_eval(lm: Any, batch_size: int) -> Contestant:
    from grist_tools.bench_eval_peers import requests

    def score(pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        lm.batch_size_per_gpu = batch_size
        return lm.loglikelihood(requests(pairs), disable_tqdm=True)

    return score


def race(
    found: Mapping[str, Contestant], pairs: Sequence[tuple[str, str]], rows: int, repetitions: int, until: float
) -> list[Row]:
    """A row of the report for each contestant. until: how long to wait for quiet, on time.perf_counter()."""
    first, *_ = [name for name in found if name != OURS]
    expected = found[first](pairs)
    wrong = differing(expected, found[OURS](pairs))
    if wrong is not None:
        return [{"who": OURS, "ok": False, "wrong": wrong}]
    right = list(found)
    runs: dict[str, list[_Run]] = {name: [] for name in right}
    for number in range(repetitions):
        at = number % len(right)
        for name in right[at:] + right[:at]:
            runs[name].append(_quiet_run(found[name], pairs, until))
    report = [{"who": name, **_row(of_one, rows)} for name, of_one in runs.items()]
    return [{**row, **_ratios(row, report)} for row in report]


def _ratios(row: Row, report: list[Row]) -> dict[str, float]:
    """To the fastest contestant that is not ours."""
    others = [other for other in report if other["who"] != OURS]
    return {
        ratio: min(other[seconds] for other in others) / row[seconds]
        for ratio, seconds in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds"))
    }


def differing(expected: list[tuple[float, bool]], found: list[tuple[float, bool]]) -> str | None:
    """The first pair whose result is another, in words."""
    for at, ((total, greedy), (own, own_greedy)) in enumerate(zip(expected, found, strict=True)):
        if not abs(total - own) <= TOLERANCE_NATS or greedy != own_greedy:
            return f"pair {at} is ({own:.4f}, {own_greedy}), but lm_eval has ({total:.4f}, {greedy})"
    return None


class _Run(NamedTuple):
    """One repetition: seconds by the clock and of the processor, and how many cores others used meanwhile."""

    seconds: float
    cpu_seconds: float
    others: float | None

    @property
    def quiet(self) -> bool:
        return self.others is None or self.others <= QUIET_CORES


def _quiet_run(score: Contestant, pairs: Sequence[tuple[str, str]], until: float) -> _Run:
    """A run that was disturbed is made again, as long as there is time."""
    while True:
        wait_until_quiet(until)
        before, start, cpu_start = usage(), time.perf_counter(), time.process_time()
        score(pairs)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        made = _Run(seconds, cpu_seconds, cores_of_others(before, usage()))
        if made.quiet or time.perf_counter() >= until:
            return made


def _row(runs: list[_Run], rows: int) -> Row:
    quiet = [made for made in runs if made.quiet]
    seconds = sorted(made.seconds for made in quiet or runs)
    return {
        "ok": True, "unit": "rows/s", "value": rows / median(seconds), "seconds": median(seconds),
        "lowest_seconds": seconds[0], "highest_seconds": seconds[-1],
        "cpu_seconds": median(made.cpu_seconds for made in quiet or runs), "repetitions": len(runs),
        "quiet": None if all(made.others is None for made in runs) else len(quiet),
    }  # fmt: skip


def over_all(rows: list[Row], count: int) -> list[Row]:
    """Every contestant's rows a second over all tasks of a model, ours beside the target. Nothing if ours was wrong."""
    if not all(row["ok"] for row in rows):
        return []
    found = []
    total = count * sum(row["who"] == OURS for row in rows)
    for name in dict.fromkeys(row["who"] for row in rows):
        spent = {key: sum(row[key] for row in rows if row["who"] == name) for key in ("seconds", "cpu_seconds")}
        rate = total / spent["seconds"]
        found.append(
            {
                "task": "all",
                "shots": None,
                "who": name,
                "ok": True,
                "unit": "rows/s",
                "value": rate,
                **spent,
                "quiet": None,
            }
        )
    found = [{**row, **_ratios(row, found)} for row in found]
    return [
        {**row, "target": TARGET, "reached": row["ratio"] >= TARGET} if row["who"] == OURS else row for row in found
    ]


def results_table(rows: list[Row]) -> str:
    header = ["model", "task", "examples", "who", "rows/s", "seconds", "ratio", "by CPU", "target", "reached", "quiet"]
    cells, notes = [], []
    for row in rows:
        names = [row["model"], row["task"], "-" if row["shots"] is None else str(row["shots"]), row["who"]]
        if not row["ok"]:
            notes.append(f"{', '.join(names)}: {row['wrong']}")
            cells.append([*names, "WRONG", *"------"])
            continue
        target, reached = row.get("target"), {True: "yes", False: "no", None: "-"}[row.get("reached")]
        quiet = "-" if row["quiet"] is None else f"{row['quiet']}/{row['repetitions']}"
        numbers = [f"{row['value']:,.1f}", f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", f"{row['cpu_ratio']:.2f}"]
        cells.append([*names, *numbers, "-" if target is None else f"{target:.1f}", reached, quiet])
    return "\n".join([table(header, cells), *notes])


def new_report(options: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    import importlib.metadata

    import torch

    from grist_eval.environment import provenance
    from grist_kernels import describe
    from grist_tools.bench_kernels import commit

    where = provenance("cpu")
    where["versions"] |= {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers")}
    settings = ("layers", "width", "vocab_size", "rows", "repetitions", "patience")
    return {
        "what": "multiple choice by likelihood",
        "command": ["python", "-m", "grist_tools.bench_eval", *command],
        "commit": commit(),
        **where,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": describe("cpu"),
        **{name: getattr(options, name) for name in settings},
        "how": HOW,
        "results": [],
    }


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from grist_eval.environment import write_json
    from grist_tools.bench_kernels import default_out

    try:
        models, tasks, sizes = check_options(options)
        until = time.perf_counter() + options.patience
        with tempfile.TemporaryDirectory(prefix="grist-bench-eval-") as name:
            found = {kind: contestants(kind, options, sizes, Path(name) / kind) for kind in models}
            report = new_report(options, sys.argv[1:] if arguments is None else arguments)
            today = datetime.date.today().isoformat()
            out = Path(options.out) if options.out else default_out(report["device"], today, "eval")
            for kind in models:
                rows: list[Row] = []
                for task, shots in tasks:
                    pairs = pairs_of(Path(name), task, shots, options.rows)
                    of_task = race(found[kind], pairs, options.rows, options.repetitions, until)
                    rows += [{"task": task, "shots": shots, **row} for row in of_task]
                    print(results_table([{"model": kind, **row} for row in rows[-len(of_task) :]]), file=sys.stderr)
                report["results"] += [{"model": kind, **row} for row in [*rows, *over_all(rows, options.rows)]]
        write_json(report, out)
    except (ValueError, ImportError, OSError) as error:
        return fail("bench_eval", error)
    print(results_table(report["results"]))
    print(f"written to {out}")
    return 0 if all(row["ok"] for row in report["results"]) else 1


if __name__ == "__main__":
    run(main)
