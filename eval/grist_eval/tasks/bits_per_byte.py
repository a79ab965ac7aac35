"""Task `bits_per_byte`: held-out loss of a dataset's split, per byte of its text."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from grist_eval.task import Subject, Task


def _add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("bits_per_byte")
    group.add_argument("--data", metavar="DATASET", help="dataset directory, prepared with the model's tokenizer")
    group.add_argument("--split", default="val", help="split of the dataset (default: %(default)s)")
    group.add_argument("--sequence-length", type=int, help="window in tokens (default: the model's context length)")
    group.add_argument("--stride", type=int, help="tokens between window starts; smaller scores with more context")
    group.add_argument("--batch-size", type=int, default=8, help="windows at once (default: %(default)s)")
    group.add_argument("--max-tokens", type=int, help="score only this many tokens, for a quick look")


def _check(options: Namespace) -> None:
    if not options.data:
        raise ValueError("task bits_per_byte needs --data DATASET, the directory that `grist_data.prepare` wrote")


def _run(subject: Subject, options: Namespace) -> dict[str, Any]:
    from grist_data import Shards
    from grist_eval.bits_per_byte import bits_per_byte

    shards = Shards.open(options.data, split=options.split)
    if shards.tokenizer_sha256 != subject.tokenizer.sha256:
        raise ValueError(
            f"the dataset {options.data} was made with another tokenizer than the model's:\n"
            f"  dataset {shards.tokenizer_sha256}\n"
            f"  model   {subject.tokenizer.sha256}\n"
            "Prepare the text again with the model's tokenizer.json."
        )
    result = bits_per_byte(
        subject.model,
        shards,
        sequence_length=options.sequence_length,
        stride=options.stride,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
        device=subject.device,
        tokenizer=subject.tokenizer,
        progress=True,
    )
    sequence_length = options.sequence_length or subject.model.config.context_length
    return {
        **result,
        "split": options.split,
        "dataset_id": shards.dataset_id,
        "sequence_length": sequence_length,
        "stride": options.stride or sequence_length,
    }


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        *([("bits per byte", f"{result['bits_per_byte']:.4f}")] if "bytes" in result else []),
        ("perplexity per token", f"{result['perplexity']:.3f}"),
        ("loss per token (nats)", f"{result['loss']:.4f}"),
        ("tokens", f"{result['tokens']:,}"),
        *([("bytes", f"{result['bytes']:,}")] if "bytes" in result else []),
    ]


TASK = Task(_add_options, _check, _run, _rows)
