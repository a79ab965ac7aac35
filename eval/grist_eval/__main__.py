"""`python -m grist_eval DIR --data DATASET`: evaluate a portable model directory, write one JSON, print a short table.

Reads nothing but the directory (config.json, model.safetensors, tokenizer.json) and, for some tasks, a dataset or a
file of prompts.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from grist_eval.environment import pick_device, provenance, sha256, write_json
from grist_eval.task import Subject
from grist_eval.tasks import TASKS

DTYPES = ["float32", "bfloat16", "float16"]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m grist_eval", description="Evaluate a portable model directory.")
    parser.add_argument("directory", metavar="DIR", help="portable model directory, as runs/NAME/model")
    parser.add_argument(
        "--tasks",
        default="bits_per_byte,samples",
        metavar="A,B",
        help=f"any of {', '.join(TASKS)} (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", help="JSON to write (default: evaluation_report.json beside DIR)")
    parser.add_argument("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything sampled (default: %(default)s)")
    for task in TASKS.values():
        task.add_options(parser)
    return parser


def chosen_tasks(text: str) -> list[str]:
    """Names in a comma-separated list, checked.

    Raises:
        ValueError: an unknown name, or none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ValueError(f"unknown task(s) {', '.join(unknown) or repr(text)}; there are {', '.join(TASKS)}")
    return list(dict.fromkeys(names))


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen tasks on the model in `options.directory`; the report as a dict that JSON can hold."""
    names = chosen_tasks(options.tasks)
    for name in names:
        TASKS[name].check(options)

    import torch

    from grist_data import Tokenizer
    from grist_model import load

    directory = Path(options.directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} is not a portable model directory: it holds no config.json")
    device = pick_device(options.device)
    started = time.perf_counter()
    model = load(directory, dtype=getattr(torch, options.dtype), device=device)
    subject = Subject(model, Tokenizer.load(directory), device)
    results = {}
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        task_started = time.perf_counter()
        results[name] = TASKS[name].run(subject, options)
        results[name]["seconds"] = round(time.perf_counter() - task_started, 3)
    return {
        "model": {
            "directory": str(directory),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": options.dtype,
            "files_sha256": {file.name: sha256(file) for file in sorted(directory.glob("*.safetensors"))},
            "tokenizer_sha256": subject.tokenizer.sha256,
        },
        **provenance(device),
        "seconds": round(time.perf_counter() - started, 3),
        "tasks": results,
    }


def table(report: dict[str, Any]) -> str:
    """The report's main numbers, a line each."""
    lines = []
    for name, result in report["tasks"].items():
        lines.append(f"{name} ({result['seconds']:.1f} s)")
        lines += [f"  {label:<24}{value}" for label, value in TASKS[name].rows(result)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    out = Path(options.out) if options.out else Path(options.directory).resolve().parent / "evaluation_report.json"
    try:
        report = evaluate(options)
        print(table(report))  # first of all: a full disk must not cost the numbers
        write_json(report, out)
    except (ValueError, OSError, ImportError) as error:
        print(f"grist_eval: {error}", file=sys.stderr)
        return 2
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
