"""EleutherAI's lm_eval on local rows, without a network: the same tasks on a model directory, by transformers or by ours.

task files of lm_eval, with the rows of another place put in -> its own prompts, requests and metrics -> one dict a row
"""

# pyright: reportMissingImports=false
# (lm_eval is nobody's dependency here.)

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grist_eval.tasks import ROW_TASKS

# Where lm_eval's file of a task lies, below lm_eval/tasks.
_FILES = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "sciq": "sciq/sciq.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "mmlu": "mmlu/default/_default_template_yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "triviaqa": "triviaqa/default.yaml",
}
PARITY_TASKS = tuple(_FILES)


def import_lm_eval() -> Any:
    """The package, told to stay off the network.

    Raises:
        ImportError: it is not installed.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    try:
        import lm_eval
    except ImportError as error:
        raise ImportError("this needs lm_eval: pip install 'lm_eval[hf]'") from error
    return lm_eval


def transformers_lm(directory: Path, batch_size: int, **options: Any) -> Any:
    """lm_eval's `hf` model: transformers on the CPU in float32."""
    import_lm_eval()
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=batch_size, **options)


def requests(pairs: Sequence[tuple[str, str]]) -> list[Any]:
    """What `LM.loglikelihood` takes, of (context, continuation) pairs."""
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)]


def evaluate(
    lm: Any, names: Sequence[str], rows: Path, examples: Path, work: Path, shots: int | None = None, **options: Any
) -> dict[str, list[dict[str, Any]]]:
    """By task, a dict a row in the order of the file: `scores`, or `text`, and lm_eval's metrics by filter.

    rows, examples: folders of NAME.jsonl. work: a folder for task files. shots None: as the task says. options: of
    `lm_eval.simple_evaluate`.
    """
    lm_eval = import_lm_eval()
    from lm_eval.tasks import TaskManager

    found = {}
    for name in names:
        files = _task_files(name, rows / f"{name}.jsonl", examples / f"{name}.jsonl", work / name)
        report = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(files),
            num_fewshot=shots,
            task_manager=TaskManager(include_path=str(work / name)),
            bootstrap_iters=0,
            log_samples=True,
            **options,
        )
        samples = [{**sample, "task": task} for task in files for sample in report["samples"][task]]
        found[name] = _by_row(samples, [place for places in files.values() for place in places])
    return found


def _task_files(name: str, rows: Path, examples: Path, work: Path) -> dict[str, list[int]]:
    """Write lm_eval task files into work -> by the name of each, which rows of the file it has."""
    work.mkdir(parents=True)
    base = Path(import_lm_eval().__file__).parent / "tasks" / _FILES[name]
    source = ROW_TASKS[name].source
    # lm_eval reads `train` of every task that says it has such a split.
    examples_split = source.examples_split or "train"
    if name != "mmlu":
        _write_task(work, f"local_{name}", base, {source.split: rows, examples_split: examples}, None)
        return {f"local_{name}": list(range(len(_lines(rows))))}
    found = {}
    for subject in sorted({json.loads(line)["subject"] for line in _lines(rows)}):
        parts = {source.split: rows, examples_split: examples}
        files = {}
        for split, path in parts.items():
            files[split] = work / f"{subject}.{split}.jsonl"
            files[split].write_text("".join(line for line in _lines(path) if json.loads(line)["subject"] == subject))
        description = (
            f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        )
        _write_task(work, f"local_mmlu_{subject}", base, files, description)
        found[f"local_mmlu_{subject}"] = [
            at for at, line in enumerate(_lines(rows)) if json.loads(line)["subject"] == subject
        ]
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def _write_task(work: Path, task: str, base: Path, files: dict[str, Path], description: str | None) -> None:
    """JSON is YAML, but for the tag of a function, which the included file has."""
    definition = {
        "include": str(base),
        "task": task,
        "tag": [],
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
        **({} if description is None else {"description": description}),
    }
    (work / f"{task}.yaml").write_text(json.dumps(definition), encoding="utf-8")


def _by_row(samples: list[dict[str, Any]], places: list[int]) -> list[dict[str, Any]]:
    """Samples come task by task, and a row once for each filter of its task."""
    order: dict[tuple[str, int], int] = {}
    found: dict[int, dict[str, Any]] = {}
    for sample in samples:
        key = (sample["task"], sample["doc_id"])
        at = places[order.setdefault(key, len(order))]
        row = found.setdefault(at, {"metrics": {}})
        for metric in sample["metrics"]:
            row["metrics"][f"{metric},{sample['filter']}"] = sample[metric]
        responses = [response[0] for response in sample["resps"]]
        if isinstance(responses[0], str):
            row["text"] = responses[0]
        else:
            row["scores"] = [(float(total), bool(greedy)) for total, greedy in responses]
    return [found[at] for at in range(len(found))]
