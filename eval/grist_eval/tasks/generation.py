"""Task `generation`: BLEU, ROUGE, distinct-n and repetition of completions of a file of prompts with references."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from grist_eval.task import Subject, Task

SCORES = ["bleu", "rouge_1", "rouge_2", "rouge_L", "distinct_1", "distinct_2", "repetition_4"]


def _add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--prompts", metavar="JSONL", help="rows of {'prompt': ..., 'references': [...]}")
    group.add_argument("--new-tokens", type=int, default=64, help="tokens a completion (default: %(default)s)")
    group.add_argument("--prompts-at-once", type=int, default=16, help="batch size (default: %(default)s)")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    group.add_argument("--top-k", type=int, help="sample among the k likeliest tokens")
    group.add_argument("--top-p", type=float, help="sample among the likeliest tokens that reach this probability")


def _check(options: Namespace) -> None:
    from grist_eval.generation import read_examples

    if not options.prompts:
        raise ValueError("task generation needs --prompts FILE.jsonl, rows of prompts with references")
    read_examples(options.prompts)  # a bad row is named before the model is loaded


def _run(subject: Subject, options: Namespace) -> dict[str, Any]:
    from grist_eval.generation import evaluate_generation, read_examples
    from grist_model.generate import Sampling

    return evaluate_generation(
        subject.model,
        subject.tokenizer,
        read_examples(options.prompts),
        sampling=Sampling(options.temperature, options.top_k, options.top_p),
        max_new_tokens=options.new_tokens,
        seed=options.seed,
        batch_size=options.prompts_at_once,
        progress=True,
    )


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", "-"), f"{result[name]:.4f}") for name in SCORES] + [
        ("examples", f"{result['examples']}")
    ]


TASK = Task(_add_options, _check, _run, _rows)
