"""Task `samples`: text after some prompts, greedy and under three ways of sampling."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_eval.task import Subject, Task

if TYPE_CHECKING:
    from grist_eval.samples import Sample
    from grist_eval.samples_page import Column


def _add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("samples")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    group.add_argument("--sample-tokens", type=int, help="tokens a sample (default: 100, or half the context if less)")
    group.add_argument("--samples-out", metavar="FILE", help="also write the samples as text to read")
    group.add_argument("--samples-page", metavar="HTML", help="also write them as a page to read")
    group.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="DIR",
        help="another model to stand beside this one on the page: its directory, or a report with its samples; may be given "
        "several times",
    )


def _check(options: Namespace) -> None:
    from grist_eval.samples_page import read_report

    if options.sample_tokens is not None and options.sample_tokens < 1:
        raise ValueError(f"--sample-tokens must be at least 1, got {options.sample_tokens}")
    if options.beside and not options.samples_page:
        raise ValueError("--beside puts models beside each other on a page: give --samples-page FILE.html")
    for name in options.beside:
        if not Path(name).is_dir():
            read_report(Path(name))
        elif not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(f"{name} is not a portable model directory: it holds no config.json")
    names = [options.directory, *options.beside]
    if len(set(names)) < len(names):
        raise ValueError(f"--beside names a model twice: {', '.join(names)}")


def _run(subject: Subject, options: Namespace) -> dict[str, Any]:
    from grist_data.atomic import write_atomically
    from grist_eval.completion import describe
    from grist_eval.samples import write_samples
    from grist_eval.samples_page import page

    samples = _drawn(subject, options)
    if options.samples_out:
        write_samples(samples, Path(options.samples_out), {"model": options.directory, "seed": options.seed})
    if options.samples_page:
        others = [_beside(name, subject, options) for name in options.beside]
        write_atomically(Path(options.samples_page), page([_column(options.directory, samples), *others]).encode())
    return {
        "seed": options.seed,
        "samples": [
            {"prompt": sample.prompt, "sampling": describe(sample.sampling), "text": sample.text} for sample in samples
        ],
    }


def _drawn(subject: Subject, options: Namespace) -> list[Sample]:
    from grist_eval.samples import draw_samples

    return draw_samples(
        subject.model,
        subject.tokenizer,
        options.prompt or [""],
        max_new_tokens=options.sample_tokens or min(100, subject.model.config.context_length // 2),
        seed=options.seed,
        progress=True,
    )


def _column(name: str, samples: list[Sample]) -> Column:
    from grist_eval.completion import describe
    from grist_eval.samples_page import Column, Drawn

    return Column(name, [Drawn(sample.prompt, describe(sample.sampling), sample.text) for sample in samples])


def _beside(name: str, subject: Subject, options: Namespace) -> Column:
    """The same prompts to another model, one at a time in memory beside the first; or what a report says."""
    if not Path(name).is_dir():
        from grist_eval.samples_page import read_report

        return read_report(Path(name))
    import torch

    from grist_data import Tokenizer
    from grist_model import load

    model = load(name, dtype=getattr(torch, options.dtype), device=subject.device)
    return _column(name, _drawn(Subject(model, Tokenizer.load(name), subject.device), options))


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("samples", f"{len(result['samples'])}")]
    first = result["samples"][0]
    text = " ".join((first["prompt"] + first["text"]).split())
    return [*rows, (first["sampling"], text if len(text) <= 60 else text[:57] + "...")]


TASK = Task(_add_options, _check, _run, _rows)
