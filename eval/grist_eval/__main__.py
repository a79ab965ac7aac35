"""`python -m grist_eval DIR --data DATASET`: evaluate a portable model directory, write one JSON, print a short table.

Reads nothing but the directory (config.json, model.safetensors, tokenizer.json) and, for some tasks, a dataset or a
file of prompts or of questions. Under torchrun several processes share the questions.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from grist_eval import question_options
from grist_eval.environment import pick_device, provenance, sha256, write_json
from grist_eval.processes import process_group
from grist_eval.questions import Questions, evaluate_tasks
from grist_eval.result_cache import key_of
from grist_eval.task import Subject
from grist_eval.tasks import ROW_TASKS, TASKS

DTYPES = ["float32", "bfloat16", "float16"]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m grist_eval", description="Evaluate a portable model directory.")
    parser.add_argument("directory", metavar="DIR", help="portable model directory, as runs/NAME/model")
    parser.add_argument(
        "--tasks",
        default="bits_per_byte,samples",
        metavar="A,B",
        help=f"any of {', '.join([*TASKS, *ROW_TASKS])} (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", help="JSON to write (default: evaluation_report.json beside DIR)")
    parser.add_argument("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything sampled (default: %(default)s)")
    for task in TASKS.values():
        task.add_options(parser)
    question_options.add_options(parser)
    return parser


def chosen_tasks(text: str) -> list[str]:
    """Names in a comma-separated list, checked.

    Raises:
        ValueError: an unknown name, or none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [*TASKS, *ROW_TASKS]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"unknown task(s) {', '.join(unknown) or repr(text)}; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen tasks on the model in `options.directory`; the report as a dict that JSON can hold.

    Under torchrun the ranks share the rows of tasks of questions and the text of bits_per_byte; what else was chosen is the
    first one's work. Each returns a report, and the first one's is whole.
    """
    names = chosen_tasks(options.tasks)
    for name in names:
        if name in TASKS:
            TASKS[name].check(options)
    asked = question_options.questions_of(options, [name for name in names if name in ROW_TASKS])
    directory = Path(options.directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} is not a portable model directory: it holds no config.json")
    with process_group(pick_device(options.device)) as (rank, world_size, device):
        return _evaluate(options, directory, names, asked, rank, world_size, device)


def _evaluate(
    options: argparse.Namespace,
    directory: Path,
    names: list[str],
    asked: list[Questions],
    rank: int,
    world_size: int,
    device: str,
) -> dict[str, Any]:
    import torch

    from grist_data import Tokenizer
    from grist_model import load

    started = time.perf_counter()
    model = load(directory, dtype=getattr(torch, options.dtype), device=device)
    subject = Subject(model, Tokenizer.load(directory), device, rank, world_size)
    facts = {
        "directory": str(directory),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": options.dtype,
        "files_sha256": {file.name: sha256(file) for file in sorted(directory.glob("*.safetensors"))},
        "tokenizer_sha256": subject.tokenizer.sha256,
    }
    # What a score depends on beside the texts: weights, what they mean, tokens and precision.
    model_key = key_of(
        [facts["files_sha256"], sha256(directory / "config.json"), facts["tokenizer_sha256"], options.dtype]
    )
    results: dict[str, Any] = {}
    items: dict[str, Any] = {}
    for name in names:
        task_started = time.perf_counter()
        if rank == 0:
            print(f"{name} ...", file=sys.stderr)
        if name in ROW_TASKS:
            found = evaluate_tasks(
                model,
                subject.tokenizer,
                [questions for questions in asked if questions.name == name],
                settings=question_options.settings_of(options),
                rank=rank,
                world_size=world_size,
                cache=options.cache,
                model_key=model_key,
                progress=True,
            )
            results[name] = found["tasks"][name]
            items[name] = found["items"][name]
        elif rank == 0 or TASKS[name].shared:
            results[name] = TASKS[name].run(subject, options)
        else:
            continue
        results[name]["seconds"] = round(time.perf_counter() - task_started, 3)
    if options.items_out and rank == 0:
        question_options.write_text(question_options.items_text(items), Path(options.items_out))
    centred = [result["centred"] for result in results.values() if "centred" in result]
    return {
        "model": facts,
        **provenance(device),
        "processes": world_size,
        "seconds": round(time.perf_counter() - started, 3),
        "tasks": results,
        **({"core": sum(centred) / len(centred)} if centred else {}),
    }


def table(report: dict[str, Any]) -> str:
    """The report's main numbers, a line each."""
    lines = []
    for name, result in report["tasks"].items():
        lines.append(f"{name} ({result['seconds']:.1f} s)")
        rows = TASKS[name].rows(result) if name in TASKS else question_options.rows_of(result)
        lines += [f"  {label:<24}{value}" for label, value in rows]
    if "core" in report:
        lines.append(
            f"CORE over {sum('centred' in result for result in report['tasks'].values())} task(s): {report['core']:.4f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    out = Path(options.out) if options.out else Path(options.directory).resolve().parent / "evaluation_report.json"
    try:
        report = evaluate(options)
        if int(os.environ.get("RANK", "0")):
            return 0
        print(table(report))  # first of all: a full disk must not cost the numbers
        write_json(report, out)
        if "core" in report:
            question_options.write_text(question_options.markdown(report), out.with_suffix(".md"))
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
