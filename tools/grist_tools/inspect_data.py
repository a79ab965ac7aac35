"""Look into a token dataset: what it holds, what its files say, what the tokens read like, and whether they are intact.

python -m grist_tools.inspect_data datasets/shakespeare
python -m grist_tools.inspect_data datasets/books --documents 3 --windows 2 --length 64
python -m grist_tools.inspect_data datasets/books --headers --counts --verify
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from grist_tools.console import count, fail, parser_for, run, size, table

if TYPE_CHECKING:
    import numpy as np

    from grist_data import Shards, Tokenizer

PERCENTILES = (5, 25, 50, 75, 95)
MOST_FREQUENT = 20


def split_table(splits: dict[str, Shards]) -> str:
    """Documents, tokens and bytes of each split, and how much room they take."""
    header = ["split", "documents", "tokens", "text", "bytes a token", "shards", "on disk"]
    rows = [
        (
            name,
            f"{shards.n_docs:,}",
            f"{shards.n_tokens:,}",
            size(shards.n_bytes),
            f"{shards.n_bytes / shards.n_tokens:.3f}" if shards.n_tokens else "-",
            str(len(shards.shards)),
            size(sum(shard.header.file_bytes for shard in shards.shards)),
        )
        for name, shards in splits.items()
    ]
    return table(header, rows)


def length_table(splits: dict[str, Shards]) -> str:
    """Tokens of a document: shortest, percentiles, mean and longest."""
    import numpy as np

    header = ["tokens a document", "shortest", *(f"{p}%" for p in PERCENTILES), "mean", "longest"]
    rows = []
    for name, shards in splits.items():
        lengths = np.diff(document_borders(shards))
        if len(lengths):
            middle = [f"{value:,.0f}" for value in np.percentile(lengths, PERCENTILES)]
            rows.append([name, f"{lengths.min():,}", *middle, f"{lengths.mean():,.1f}", f"{lengths.max():,}"])
    return table(header, rows)


def document_borders(shards: Shards) -> np.ndarray:
    """Where the documents of a split begin, and at the end its number of tokens: (n_docs + 1,) int64."""
    import numpy as np

    borders, start = [np.zeros(1, np.int64)], 0
    for shard in shards.shards:  # a document never crosses from one shard into the next
        borders.append(shard.doc_ends.astype(np.int64) + start)
        start += shard.header.n_tokens
    return np.concatenate(borders)


def header_table(splits: dict[str, Shards]) -> str:
    """What the header of each file says."""
    header = ["file", "tokens", "documents", "bytes an id", "vocabulary", "end of text", "root checksum"]
    rows = [
        (
            shard.path.name,
            f"{shard.header.n_tokens:,}",
            f"{shard.header.n_docs:,}",
            str(shard.header.encoding.token_bytes),
            f"{shard.header.encoding.vocab_size:,}",
            "-" if shard.header.encoding.eot_id is None else str(shard.header.encoding.eot_id),
            f"{shard.header.root:016x}",
        )
        for shards in splits.values()
        for shard in shards.shards
    ]
    return table(header, rows)


def document_text(shards: Shards, tokenizer: Tokenizer, number: int, most: int) -> str:
    """A document as its tokens decode, special tokens by name, its middle left out where it is longer than `most`."""
    start, end = document_borders(shards)[number : number + 2].tolist()
    text = tokenizer.decode(shards.read(start, end - start).tolist())
    if len(text) > most:
        text = f"{text[: most // 2]} [... {len(text) - most:,} characters ...] {text[-(most - most // 2) :]}"
    return f"--- document {number:,}: tokens {start:,} to {end:,}\n{text}"


def window_text(shards: Shards, tokenizer: Tokenizer, start: int, length: int) -> str:
    """Tokens [start, start + length), each between bars, with its id where it alone is no text."""
    ids = shards.read(start, length).tolist()
    return f"--- window: tokens {start:,} to {start + length:,}\n" + "|".join(token_text(tokenizer, id_) for id_ in ids)


def token_text(tokenizer: Tokenizer, id_: int) -> str:
    """One token to read: line ends as \\n, and <id> for a part of a character."""
    text = tokenizer.decode([id_])
    return f"<{id_}>" if "\N{REPLACEMENT CHARACTER}" in text else text.replace("\n", "\\n")


def sample(how_many: int, below: int, seed: int) -> list[int]:
    """Different numbers from 0 up to `below`, ascending, the same for a seed."""
    import random

    return sorted(random.Random(seed).sample(range(below), min(how_many, below)))


def count_tokens(shards: Shards) -> np.ndarray:
    """How often each id occurs: (V,) int64. Reads every token."""
    import numpy as np
    from tqdm import tqdm

    counts = np.zeros(shards.vocab_size, np.int64)
    step = 1 << 22
    with tqdm(total=shards.n_tokens, desc="count", unit="tok", unit_scale=True, leave=False, disable=None) as bar:
        for start in range(0, shards.n_tokens, step):
            ids = shards.read(start, min(step, shards.n_tokens - start))
            counts += np.bincount(ids, minlength=shards.vocab_size)
            bar.update(len(ids))
    return counts


def counts_text(name: str, counts: np.ndarray, tokenizer: Tokenizer) -> str:
    """How much of the vocabulary occurs, and the most frequent tokens."""
    used = int((counts > 0).sum())
    order = counts.argsort()[::-1][: min(MOST_FREQUENT, used)]
    rows = []
    for id_ in order.tolist():
        quoted = f"'{token_text(tokenizer, id_)}'"  # a leading space is part of a token
        rows.append((quoted, str(id_), f"{counts[id_]:,}", f"{counts[id_] / counts.sum():.2%}"))
    shown = table(["token", "id", "times", "share"], rows)
    return f"{name}: {used:,} of {len(counts):,} ids occur, {count(counts.sum())} tokens\n{shown}"


def verify(splits: dict[str, Shards]) -> int:
    """Check every byte of every shard; the number of bytes. Raises ValueError naming every damaged block."""
    from tqdm import tqdm

    shards = [shard for each in splits.values() for shard in each.shards]
    problems = [
        problem
        for shard in tqdm(shards, desc="verify", unit="shard", leave=False, disable=None)
        for problem in shard.problems()
    ]
    if problems:
        raise ValueError(f"{len(problems)} damaged block(s):\n" + "\n".join(problems))
    return sum(shard.header.file_bytes for shard in shards)


def parser() -> argparse.ArgumentParser:
    parser = parser_for("inspect_data", __doc__)
    parser.add_argument("dataset", metavar="DATASET", help="directory that grist_data.prepare wrote")
    parser.add_argument("--split", help="only this split (default: all)")
    parser.add_argument("--documents", type=int, default=0, metavar="N", help="show N random documents of each split")
    parser.add_argument("--characters", type=int, default=600, help="of a document to show (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=0, metavar="N", help="show N random windows token by token")
    parser.add_argument("--length", type=int, default=64, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: %(default)s)")
    parser.add_argument("--headers", action="store_true", help="show the header of every file")
    parser.add_argument("--counts", action="store_true", help="count how often each token occurs (reads everything)")
    parser.add_argument(
        "--verify", action="store_true", help="check every byte against its checksum (reads everything)"
    )
    return parser


def report(options: argparse.Namespace) -> None:
    """Print what was asked for.

    Raises:
        FileNotFoundError: no dataset there, or a file of it is missing.
        ValueError: no such split, an unfinished dataset, or a damaged file.
    """
    from grist_data import Shards, Tokenizer
    from grist_data.manifest import read_manifest

    directory = Path(options.dataset)
    manifest = read_manifest(directory)
    names = [options.split] if options.split else list(manifest["splits"])
    splits = {name: Shards.open(directory, split=name) for name in names}
    tokenizer = Tokenizer.load(directory)
    source = manifest["source"]
    print(f"{directory}\ndataset    {manifest['dataset_id']}")
    print(f"tokenizer  {tokenizer.kind}, {tokenizer.vocab_size:,} ids, sha256 {tokenizer.sha256}")
    print(f"source     {source['name']}, {source['documents']:,} documents, {size(source['text_bytes'])}")
    print(f"\n{split_table(splits)}\n\n{length_table(splits)}")
    if options.headers:
        print(f"\n{header_table(splits)}")
    for name, shards in splits.items():
        show_samples(name, shards, tokenizer, options)
    if options.verify:
        print(f"\nverified: {size(verify(splits))}, every checksum matches")


def show_samples(name: str, shards: Shards, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """Documents, windows and counts of one split, as far as they were asked for."""
    if options.documents or options.windows:
        print(f"\n=== {name}")
    for number in sample(options.documents, shards.n_docs, options.seed):
        print(document_text(shards, tokenizer, number, options.characters))
    length = min(options.length, shards.n_tokens)
    for start in sample(options.windows, shards.n_tokens - length + 1, options.seed):
        print(window_text(shards, tokenizer, start, length))
    if options.counts:
        print(f"\n{counts_text(name, count_tokens(shards), tokenizer)}")


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        report(options)
    except (ValueError, OSError) as error:
        return fail("inspect_data", error)
    return 0


if __name__ == "__main__":
    run(main)
