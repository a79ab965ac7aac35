"""What our scores are held against lm_eval's on: a tiny Llama, a tokenizer of invented text, invented rows; all from seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_house

import grist_model
from grist_data.tokenizer_training import train_bpe
from grist_eval.questions import Settings, evaluate_tasks
from grist_tools.bench_eval_rows import invented_text, write_rows

PLAIN = {
    "sinks": False, "mlp_bias": False, "attention_bias": False, "swiglu_alpha": None, "swiglu_limit": None, "experts": 0,
    "window": None, "window_layers": "none", "context_length": 512, "expert_width": 48,
}  # fmt: skip
ANSWER_TOKENS = 24
# By name of a part: (tasks, rows of each, examples before each). lm_eval draws LAMBADA's examples from the rows that it scores,
# the row itself among them; ours never are, so there are none here.
PARTS = {
    "zero": (("hellaswag", "arc_easy", "piqa", "winogrande", "boolq", "lambada_openai"), 100, 0),
    "zero_small": (
        ("arc_challenge", "openbookqa", "sciq", "commonsense_qa", "mmlu", "gsm8k", "triviaqa"), 25, 0,
    ),
    "two": (
        ("hellaswag", "arc_easy", "piqa", "winogrande", "boolq", "openbookqa", "sciq", "commonsense_qa", "mmlu", "gsm8k",
         "triviaqa"), 10, 2,
    ),
}  # fmt: skip
EXAMPLES = 40


def subject() -> tuple[Any, Any]:
    """-> (model, tokenizer)."""
    tokenizer = train_bpe([invented_text(500)], 512)
    return tiny_house.model(tokenizer.vocab_size, **PLAIN), tokenizer


def portable(directory: Path) -> Path:
    model, tokenizer = subject()
    grist_model.save(model, directory, tokenizer=tokenizer)
    return directory


def write_part(folder: Path, part: str) -> tuple[Path, Path]:
    """-> folders of rows and of examples."""
    tasks, count, _ = PARTS[part]
    for task in tasks:
        write_rows(folder / "rows", task, count)
        write_rows(folder / "examples", task, EXAMPLES, seed=5)
    return folder / "rows", folder / "examples"


def our_items(model: Any, tokenizer: Any, folder: Path, part: str) -> dict[str, list[dict[str, Any]]]:
    """`items` of `evaluate_tasks`."""
    tasks, _, shots = PARTS[part]
    rows, examples = write_part(folder, part)
    files = ({task: place / f"{task}.jsonl" for task in tasks} for place in (rows, examples))
    data, drawn_from = files
    settings = Settings(shots=shots, max_new_tokens=ANSWER_TOKENS)
    return evaluate_tasks(model, tokenizer, tasks, data=data, examples=drawn_from, settings=settings)["items"]


def differences(theirs: list[dict[str, Any]], ours: list[dict[str, Any]], tolerance: float) -> list[str]:
    """Where the rows of a task differ: log-likelihoods by more than tolerance (nats), anything else at all."""
    found = []
    for at, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if a.get("text") != b.get("text"):
            found.append(f"row {at}: wrote {b.get('text')!r}, but lm_eval has {a.get('text')!r}")
        for (total, greedy), score in zip(a.get("scores", []), b.get("scores", []), strict=True):
            if abs(total - score.log_likelihood) > tolerance or bool(greedy) != score.greedy:
                found.append(f"row {at}: {score}, but lm_eval has {total}, greedy {bool(greedy)}")
        for name, value in a["metrics"].items():
            metric, _, filter_name = name.partition(",")
            own = filter_name.replace("-", "_") if filter_name in ("strict-match", "flexible-extract") else metric
            if metric != "perplexity" and b[own] != value:  # a row's perplexity is its log-likelihood, seen above
                found.append(f"row {at}: {own} is {b[own]}, but lm_eval has {name} {value}")
    return found
