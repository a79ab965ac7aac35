"""Look into a dataset: its size and compression, lengths of documents, which tokens occur how often, and what it reads like.

    python -m grist_data.inspect datasets/stories
    python -m grist_data.inspect datasets/stories --split val --documents 5 --page stories.html

Reads every token once, to count them; --no_counts leaves that out, and then only sizes, ends and the documents shown are read.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_data.run_command import parser_for, run_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from grist_data.shards import Shards
    from grist_data.statistics import Lengths
    from grist_data.tokenizer import Tokenizer

MOST_FREQUENT = 20
TRAINED_MARKS = "⟦⟧"


@dataclass(frozen=True)
class SplitReport:
    """Facts of a split. counts: (V,) int64, how often each id occurs, or None. samples: (number, text) of documents."""

    shards: Shards
    lengths: Lengths
    counts: np.ndarray | None
    samples: tuple[tuple[int, str], ...]


def report(
    directory: str | Path,
    split: str | None = None,
    counts: bool = True,
    documents: int = 3,
    characters: int = 600,
    seed: int = 0,
) -> dict[str, SplitReport]:
    """Name of each split -> what was found out about it.

    documents: how many to show, chosen by seed; characters: of each. Raises FileNotFoundError where there is no dataset,
    ValueError for no such split or a damaged file.
    """
    from grist_data.manifest import read_manifest
    from grist_data.shards import Shards
    from grist_data.statistics import count_ids, document_lengths
    from grist_data.tokenizer import Tokenizer

    names = [split] if split else list(read_manifest(Path(directory))["splits"])
    opened = {name: Shards.open(directory, name, verify="lazy") for name in names}
    tokenizer = Tokenizer.load(directory)
    return {
        name: SplitReport(
            shards,
            document_lengths(shards),
            count_ids(shards) if counts else None,
            _samples(shards, tokenizer, documents, characters, seed),
        )
        for name, shards in opened.items()
    }


def _samples(
    shards: Shards, tokenizer: Tokenizer, how_many: int, characters: int, seed: int
) -> tuple[tuple[int, str], ...]:
    """Documents as their tokens decode, special tokens by name, cut after `characters`.

    Under a loss mask what is trained stands between `TRAINED_MARKS`.
    """
    import random

    from grist_data.document_index import DocumentIndex

    index = DocumentIndex(shards)
    chosen = sorted(random.Random(seed).sample(range(index.n_docs), min(how_many, index.n_docs)))
    found = []
    for number in chosen:
        start, stop = index.span(number)
        # A character takes at most a few tokens, so a book need not be decoded for its beginning.
        read = min(stop - start, 4 * characters + 4)
        text = _marked(shards, tokenizer, start, read)
        cut = len(text) > characters or start + read < stop
        found.append((number, f"{text[:characters]} [... {stop - start:,} tokens in all]" if cut else text))
    return tuple(found)


def _marked(shards: Shards, tokenizer: Tokenizer, start: int, n: int) -> str:
    import numpy as np

    ids = shards.read(start, n).tolist()
    if not shards.has_loss_mask:
        return tokenizer.decode(ids)
    trained = shards.trained(start, n)
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), n]
    runs = [(tokenizer.decode(ids[a:b]), bool(trained[a])) for a, b in itertools.pairwise(edges)]
    opening, closing = TRAINED_MARKS
    return "".join(f"{opening}{text}{closing}" if of_run else text for text, of_run in runs)


def text_of(directory: str | Path, reports: dict[str, SplitReport]) -> str:
    """All of it as text."""
    from grist_data.manifest import read_manifest
    from grist_data.tokenizer import Tokenizer

    manifest, tokenizer = read_manifest(Path(directory)), Tokenizer.load(directory)
    blocks = [
        f"{directory}\ndataset    {manifest['dataset_id']}\nsource     {manifest['source']['name']}\n"
        f"tokenizer  {tokenizer.kind}, {tokenizer.vocab_size:,} ids, sha256 {tokenizer.sha256}",
        table(_size_header(reports), _size_rows(reports)),
        table(_length_header(), _length_rows(reports)),
    ]
    for name, found in reports.items():
        if found.counts is not None:
            blocks.append(_counts_text(name, found, tokenizer))
    for name, found in reports.items():
        blocks += [f"--- {name}, document {number:,}\n{text}" for number, text in found.samples]
    return "\n\n".join(blocks)


def _size_header(reports: dict[str, SplitReport]) -> list[str]:
    trained = ["trained tokens", "share"] if _has_mask(reports) else []
    return ["split", "documents", "tokens", *trained, "bytes of text", "bytes a token", "shards"]


def _has_mask(reports: dict[str, SplitReport]) -> bool:
    return any(found.shards.has_loss_mask for found in reports.values())


def _size_rows(reports: dict[str, SplitReport]) -> list[list[str]]:
    rows = []
    for name, found in reports.items():
        shards = found.shards
        counts = [f"{number:,}" for number in (shards.n_docs, shards.n_tokens)]
        if _has_mask(reports):
            counts += [f"{shards.n_trained_tokens:,}", f"{shards.n_trained_tokens / shards.n_tokens:.1%}"]
        rows.append(
            [name, *counts, f"{shards.n_bytes:,}", f"{shards.n_bytes / shards.n_tokens:.3f}", str(len(shards.shards))]
        )
    return rows


def _length_header() -> list[str]:
    from grist_data.statistics import PERCENTILES

    return ["tokens a document", "shortest", *(f"{p}%" for p in PERCENTILES), "longest", "mean"]


def _length_rows(reports: dict[str, SplitReport]) -> list[list[str]]:
    from grist_data.statistics import PERCENTILES

    shares = [0, *(p / 100 for p in PERCENTILES), 1]
    return [
        [name, *(f"{found.lengths.quantile(share):,}" for share in shares), f"{found.lengths.mean:,.1f}"]
        for name, found in reports.items()
    ]


def _counts_text(name: str, found: SplitReport, tokenizer: Tokenizer) -> str:
    from grist_data.statistics import entropy_bits

    counts = found.counts
    assert counts is not None, "asked for by the caller only where they were counted"
    total, used = int(counts.sum()), int((counts > 0).sum())
    rows = []
    for id_ in counts.argsort(kind="stable")[::-1][: min(MOST_FREQUENT, used)].tolist():
        rows.append([f"'{token_text(tokenizer, id_)}'", str(id_), f"{counts[id_]:,}", f"{counts[id_] / total:.2%}"])
    return (
        f"{name}: {used:,} of {len(counts):,} ids occur; {entropy_bits(counts):.2f} bits a token by frequency alone\n"
        + table(["token", "id", "times", "share"], rows)
    )


def token_text(tokenizer: Tokenizer, id_: int) -> str:
    """One token to read: line ends as \\n, and <id> for a part of a character."""
    text = tokenizer.decode([id_])
    return f"<{id_}>" if "\N{REPLACEMENT CHARACTER}" in text else text.replace("\n", "\\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first set left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def parser() -> argparse.ArgumentParser:
    parser = parser_for("inspect", __doc__)
    parser.add_argument("dataset", metavar="DATASET")
    parser.add_argument("--split", help="only this one")
    parser.add_argument(
        "--documents", type=int, default=3, metavar="N", help="documents to show of a split [%(default)s]"
    )
    parser.add_argument("--characters", type=int, default=600, metavar="N", help="of each [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="chooses the documents [%(default)s]")
    parser.add_argument("--no_counts", action="store_true", help="do not read every token to count them")
    parser.add_argument("--page", metavar="FILE.html", help="write a page with plots as well")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options: Any = parser().parse_args(arguments)

    def action() -> int:
        counts = not options.no_counts
        found = report(options.dataset, options.split, counts, options.documents, options.characters, options.seed)
        text = text_of(options.dataset, found)
        print(text)
        if options.page:
            from grist_data.inspect_page import write_page

            write_page(Path(options.page), str(options.dataset), text, found)
            print(f"\n{options.page}", file=sys.stderr)
        return 0

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main())
