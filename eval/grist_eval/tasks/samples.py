"""Task `samples`: text after some prompts, greedy and under three ways of sampling."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from grist_eval.task import Subject, Task


def _add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("samples")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    group.add_argument("--sample-tokens", type=int, help="tokens a sample (default: 100, or half the context if less)")
    group.add_argument("--samples-out", metavar="FILE", help="also write the samples as text to read")


def _check(options: Namespace) -> None:
    if options.sample_tokens is not None and options.sample_tokens < 1:
        raise ValueError(f"--sample-tokens must be at least 1, got {options.sample_tokens}")


def _run(subject: Subject, options: Namespace) -> dict[str, Any]:
    from grist_eval.completion import describe
    from grist_eval.samples import draw_samples, write_samples

    samples = draw_samples(
        subject.model,
        subject.tokenizer,
        options.prompt or [""],
        max_new_tokens=options.sample_tokens or min(100, subject.model.config.context_length // 2),
        seed=options.seed,
        progress=True,
    )
    if options.samples_out:
        write_samples(samples, Path(options.samples_out), {"model": options.directory, "seed": options.seed})
    return {
        "seed": options.seed,
        "samples": [
            {"prompt": sample.prompt, "sampling": describe(sample.sampling), "text": sample.text} for sample in samples
        ],
    }


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("samples", f"{len(result['samples'])}")]
    first = result["samples"][0]
    text = " ".join((first["prompt"] + first["text"]).split())
    return [*rows, (first["sampling"], text if len(text) <= 60 else text[:57] + "...")]


TASK = Task(_add_options, _check, _run, _rows)
