"""Task `bits_per_byte`: held-out loss per byte of text, of a dataset's split or of texts as they are."""

from __future__ import annotations

import contextlib
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_eval.task import Subject, Task

if TYPE_CHECKING:
    from grist_eval.document_streams import Figures
    from grist_eval.text_documents import TextDocument, TextSources

_DOMAINS_SHOWN = 20


def _add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("bits_per_byte")
    group.add_argument(
        "--data",
        metavar="DATASET",
        help="dataset directory, prepared with the model's tokenizer; or a file of JSON lines",
    )
    group.add_argument("--text", nargs="+", default=[], metavar="FILE", help="texts instead, a document each")
    group.add_argument("--text-column", default="text", help="of JSON lines (default: %(default)s)")
    group.add_argument("--domain-column", help="of JSON lines, to tell figures apart by (default: the file's name)")
    group.add_argument("--documents-out", metavar="JSONL", help="also write every document's figures (of texts)")
    group.add_argument("--split", default="val", help="split of the dataset (default: %(default)s)")
    group.add_argument("--sequence-length", type=int, help="window in tokens (default: the model's context length)")
    group.add_argument("--stride", type=int, help="tokens between window starts; smaller scores with more context")
    group.add_argument("--batch-size", type=int, default=8, help="windows at once (default: %(default)s)")
    group.add_argument("--max-tokens", type=int, help="score only this many tokens of a dataset, for a quick look")


def _sources(options: Namespace) -> TextSources | None:
    """None where a dataset directory is to be measured.

    Raises:
        ValueError: neither a dataset nor texts; an option of the other kind.
    """
    from grist_eval.text_documents import TextSources

    rows = Path(options.data) if options.data and Path(options.data).is_file() else None
    if not options.data and not options.text:
        raise ValueError(
            "task bits_per_byte needs --data DATASET, the directory that `grist_data.prepare` wrote, or --data FILE.jsonl, or "
            "--text FILE ..."
        )
    if rows is None and not options.text:
        for name in ("domain_column", "documents_out"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} is for texts, but {options.data} is no file of JSON lines"
                )
        return None
    if options.data and rows is None:
        raise ValueError(f"--text and the dataset {options.data} are measured apart: give one of them")
    if options.max_tokens is not None:
        raise ValueError("--max-tokens is for a dataset; of texts, whole documents are measured: give fewer")
    texts = tuple(map(Path, options.text))
    return TextSources(texts, () if rows is None else (rows,), options.text_column, options.domain_column)


def _check(options: Namespace) -> None:
    from grist_eval.text_documents import check_documents

    sources = _sources(options)
    if sources is not None:
        check_documents(sources)  # a bad row is named before the model is loaded


def _run(subject: Subject, options: Namespace) -> dict[str, Any]:
    sources = _sources(options)
    found = _of_dataset(subject, options) if sources is None else _of_texts(subject, options, sources)
    sequence_length = options.sequence_length or subject.model.config.context_length
    return {**found, "sequence_length": sequence_length, "stride": options.stride or sequence_length}


def _of_dataset(subject: Subject, options: Namespace) -> dict[str, Any]:
    from grist_data import Shards
    from grist_eval.bits_per_byte import bits_per_byte

    shards = Shards.open(options.data, split=options.split)
    if shards.tokenizer_sha256 != subject.tokenizer.sha256:
        raise ValueError(
            f"the dataset {options.data} was made with another tokenizer than the model's:\n"
            f"  dataset {shards.tokenizer_sha256}\n"
            f"  model   {subject.tokenizer.sha256}\n"
            "Prepare the text again with the model's tokenizer.json, or measure the text itself: --text or --data FILE.jsonl."
        )
    result = bits_per_byte(
        subject.model,
        shards,
        sequence_length=options.sequence_length,
        stride=options.stride,
        batch_size=options.batch_size,
        rank=subject.rank,
        world_size=subject.world_size,
        max_tokens=options.max_tokens,
        device=subject.device,
        tokenizer=subject.tokenizer,
        progress=True,
    )
    return {**result, "split": options.split, "dataset_id": shards.dataset_id}


def _of_texts(subject: Subject, options: Namespace, sources: TextSources) -> dict[str, Any]:
    from grist_eval.bits_per_byte_documents import bits_per_byte_of_documents
    from grist_eval.text_documents import check_documents, read_documents

    sequence_length = options.sequence_length or subject.model.config.context_length
    with _written(options.documents_out if subject.rank == 0 else None) as done:
        return bits_per_byte_of_documents(
            subject.model,
            subject.tokenizer,
            read_documents(sources),
            sequence_length=options.sequence_length,
            stride=options.stride,
            batch_tokens=options.batch_size * sequence_length,
            rank=subject.rank,
            world_size=subject.world_size,
            cache=options.cache,
            model_key=None if options.cache is None else _model_key(subject, options),
            done=done,
            total=check_documents(sources),
            progress=True,
        )


def _model_key(subject: Subject, options: Namespace) -> str:
    """Of what figures depend on beside the texts: weights, what they mean, tokens and precision."""
    from grist_eval.environment import sha256
    from grist_eval.result_cache import key_of

    directory = Path(options.directory)
    files = [*sorted(directory.glob("*.safetensors")), directory / "config.json"]
    return key_of([{file.name: sha256(file) for file in files}, subject.tokenizer.sha256, options.dtype])


@contextlib.contextmanager
def _written(path: str | None) -> Iterator[Callable[[TextDocument, Figures], Any] | None]:
    """-> what writes a document's line; the file appears when all of them are there."""
    if path is None:
        yield None
        return
    from grist_data.atomic import atomic_file
    from grist_eval.document_figures import report

    with atomic_file(Path(path)) as file:

        def write(document: TextDocument, found: Figures) -> None:
            row = {"document": document.where, "domain": document.domain, **report(*found)}
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())

        yield write


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        *([("bits per byte", _with_interval(result, "bits_per_byte", ".4f"))] if "bytes" in result else []),
        ("perplexity per token", _with_interval(result, "perplexity", ".3f")),
        ("loss per token (nats)", f"{result['loss']:.4f}"),
        ("tokens", f"{result['tokens']:,}"),
        *([("bytes", f"{result['bytes']:,}")] if "bytes" in result else []),
        *([("documents", f"{result['documents']:,}")] if "documents" in result else []),
        *_domain_rows(result.get("domains", {})),
    ]


def _with_interval(result: dict[str, Any], name: str, form: str) -> str:
    if f"{name}_low" not in result:
        return f"{result[name]:{form}}"
    return f"{result[name]:{form}}  (95 %: {result[f'{name}_low']:{form}} to {result[f'{name}_high']:{form}})"


def _domain_rows(domains: dict[str, Any]) -> list[tuple[str, str]]:
    if len(domains) < 2:
        return []
    rows = [(f"bits per byte, {name}", _with_interval(each, "bits_per_byte", ".4f")) for name, each in domains.items()]
    left_out = len(rows) - _DOMAINS_SHOWN
    return rows[:_DOMAINS_SHOWN] + ([("more domains", f"{left_out:,}, in the JSON")] if left_out > 0 else [])


TASK = Task(_add_options, _check, _run, _rows, shared=True)
