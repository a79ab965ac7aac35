"""Tasks of questions on the command line: their options, what runs on them, and the table of their results."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grist_eval import few_shot
from grist_eval.questions import Questions, Settings, load_questions
from grist_eval.scoring import BATCH_TOKENS

_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")


def add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("tasks of questions")
    group.add_argument(
        "--task-data",
        action="append",
        default=[],
        metavar="FILES",
        help="TASK=FILE, rows in the columns of the task's dataset (.jsonl, .parquet, .arrow), or a folder of TASK.jsonl "
        "and so on; may be given several times (default: the dataset, by its name on the hub)",
    )
    group.add_argument(
        "--task-examples", action="append", default=[], metavar="FILES", help="the same, of rows for few-shot examples"
    )
    group.add_argument("--shots", type=int, help="examples before each question (default: the task's own number)")
    group.add_argument(
        "--examples-seed", type=int, default=few_shot.SEED, help="of the draws of examples (default: %(default)s)"
    )
    group.add_argument("--limit", type=int, help="the first rows of each task only")
    group.add_argument(
        "--bos", default="tokenizer", choices=["tokenizer", "always", "never"],
        help="begin-of-text token in front: as the tokenizer's files say, or not (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--answer-tokens", type=int, help="tokens that an answer may have (default: the task's own)")
    group.add_argument(
        "--batch-tokens", type=int, default=BATCH_TOKENS, help="tokens of a batch, about (default: %(default)s)"
    )
    group.add_argument("--cache", metavar="DIR", help="keep results there, and take from there what is known")
    group.add_argument("--items-out", metavar="JSONL", help="also write every row's scores")
    group.add_argument(
        "--allow-code-execution", action="store_true", help="let humaneval and mbpp run what the model wrote"
    )


def settings_of(options: Namespace) -> Settings:
    """Raises ValueError for a number out of range."""
    return Settings(
        shots=options.shots,
        seed=options.examples_seed,
        limit=options.limit,
        bos=options.bos,
        batch_tokens=options.batch_tokens,
        max_new_tokens=options.answer_tokens,
        allow_code=options.allow_code_execution,
    )


def questions_of(options: Namespace, names: list[str]) -> list[Questions]:
    """The rows of the tasks, read before the model is. Raises what `load_questions` raises."""
    data = files_of(options.task_data, names, "--task-data")
    examples = files_of(options.task_examples, names, "--task-examples")
    return load_questions(names, data=data, examples=examples, settings=settings_of(options))


def files_of(given: Iterable[str], names: list[str], option: str) -> dict[str, Path]:
    """Task -> file, from TASK=FILE and folders.

    Raises:
        ValueError: neither the one nor the other; a folder with two files of a task, or with none of any.
    """
    found: dict[str, Path] = {}
    for each in given:
        name, equals, file = each.partition("=")
        if equals and name in names:
            found[name] = Path(file)
        elif Path(each).is_dir():
            inside = {name: _in_folder(Path(each), name, option) for name in names}
            if not any(inside.values()):
                raise ValueError(f"{option} {each}: there is no file of {' or '.join(names)}, such as {names[0]}.jsonl")
            found |= {name: path for name, path in inside.items() if path is not None}
        else:
            raise ValueError(
                f"{option} {each!r} is neither a folder nor TASK=FILE with a task that was asked for: {', '.join(names)}"
            )
    return found


def _in_folder(folder: Path, name: str, option: str) -> Path | None:
    there = [path for suffix in _SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
    if len(there) > 1:
        raise ValueError(
            f"{option} {folder}: both {there[0].name} and {there[1].name} are there; name one, {name}=FILE"
        )
    return there[0] if there else None


def rows_of(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(metric, value) pairs of a task's result for the printed table."""
    metrics = [name.removesuffix("_stderr") for name in result if name.endswith("_stderr")]
    rows = [(name, _with_error(result[name], result[f"{name}_stderr"])) for name in metrics]
    return [*rows, ("rows", f"{result['rows']:,}, {result['shots']} examples before each")]


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def markdown(report: dict[str, Any]) -> str:
    """The tasks of questions as a Markdown table, a line each."""
    found = {name: result for name, result in report["tasks"].items() if "centred" in result}
    lines = ["| task | rows | examples | metric | value | ± | centred |", "|---|---:|---:|---|---:|---:|---:|"]
    for name, result in found.items():
        main = result["main"]
        error = result[f"{main}_stderr"]
        cells = [name, result["rows"], result["shots"], main, f"{result[main]:.4f}"]
        cells += ["" if error is None else f"{error:.4f}", f"{result['centred']:.4f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    model = report["model"]
    weights = ", ".join(sorted(digest[:12] for digest in model["files_sha256"].values()))
    about = f"{report['device']}, {model['dtype']}, torch {report['versions']['torch']}, {report['date']}"
    return "\n".join(
        [*lines, "", f"CORE, the mean of the last column: {report['core']:.4f}", "", f"Weights {weights}; {about}.", ""]
    )


def write_text(text: str, path: Path) -> None:
    """Write under a temporary name in the same folder, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def items_text(items: dict[str, list[dict[str, Any]]]) -> str:
    """A line of JSON a row: its task, its number from 0, and its metrics and scores."""
    rows = ({"task": task, "row": at, **item} for task, of_task in items.items() for at, item in enumerate(of_task))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
