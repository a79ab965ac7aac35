"""What differs between two datasets, in words.

    python -m grist_data.diff datasets/books datasets/books_again

Compares settings, source, tokenizer, splits, documents (by the hash of their text) and, where those are the same, every token.
Ends with status 0 when nothing differs, 1 when something does, 2 when one of them cannot be read.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_data.run_command import parser_for, run_command

if TYPE_CHECKING:
    from grist_data.shards import Shards

_FACTS = ("settings", "source", "conversations", "held_out")
_PIECE_TOKENS = 1 << 20


def differences(one: str | Path, other: str | Path) -> list[str]:
    """A line for everything that differs; empty for datasets that are the same. Where they lie does not count.

    Raises FileNotFoundError and ValueError where one of them is no dataset, or damaged.
    """
    from grist_data.manifest import read_manifest
    from grist_data.shards import Shards

    a, b = (read_manifest(Path(directory)) for directory in (one, other))
    lines = [line for key in _FACTS for line in _of_values(key, a.get(key), b.get(key))]
    lines += _of_values("tokenizer", a["tokenizer"], b["tokenizer"])
    for split in dict.fromkeys([*a["splits"], *b["splits"]]):
        if split not in b["splits"] or split not in a["splits"]:
            lines.append(f"split {split}: only in the {'first' if split in a['splits'] else 'second'}")
            continue
        opened = [Shards.open(directory, split, verify="lazy") for directory in (one, other)]
        lines += _of_splits(split, a["splits"][split], b["splits"][split], *opened)
    if not lines and a["dataset_id"] != b["dataset_id"]:
        lines.append(f"dataset_id: {a['dataset_id']}, then {b['dataset_id']}")
    return lines


def _of_values(name: str, a: Any, b: Any) -> list[str]:
    """Differences of two JSON values, by the path to each."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [line for key in {**a, **b} for line in _of_values(f"{name}.{key}", a.get(key), b.get(key))]
    return [] if a == b else [f"{name}: {_short(a)}, then {_short(b)}"]


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _of_splits(split: str, facts_a: dict[str, Any], facts_b: dict[str, Any], a: Shards, b: Shards) -> list[str]:
    names = {
        "documents": "documents",
        "tokens": "tokens",
        "text_bytes": "bytes of text",
        "trained_tokens": "trained tokens",
    }
    counts = [{"trained_tokens": facts["tokens"], **facts} for facts in (facts_a, facts_b)]
    lines = [
        f"split {split}: {counts[0][key]:,} {name}, then {counts[1][key]:,}"
        for key, name in names.items()
        if counts[0][key] != counts[1][key]
    ]
    if facts_a["token_dtype"] != facts_b["token_dtype"]:
        lines.append(f"split {split}: ids of {facts_a['token_dtype']}, then {facts_b['token_dtype']}")
    cuts = [[shard.header.n_tokens for shard in shards.shards] for shards in (a, b)]
    if cuts[0] != cuts[1]:
        lines.append(f"split {split}: {len(cuts[0])} shards, then {len(cuts[1])}, or cut at other places")
    documents = _of_documents(split, a, b)
    if not documents and a.tokenizer_sha256 == b.tokenizer_sha256:
        documents = _of_tokens(split, a, b)
    return lines + documents


def _of_documents(split: str, a: Shards, b: Shards) -> list[str]:
    from grist_data.document_index import DocumentIndex, common_documents

    one, other = DocumentIndex(a), DocumentIndex(b)
    first = _first_different(one, other)
    if first is None:
        return []
    common = common_documents(one, other)
    if common == one.n_docs == other.n_docs:
        return [f"split {split}: the same {common:,} documents in another order, from document {first:,} on"]
    return [
        f"split {split}: {common:,} documents are in both, {one.n_docs - common:,} only in the first,"
        f" {other.n_docs - common:,} only in the second; document {first:,} is the first that differs"
    ]


def _first_different(one: Any, other: Any) -> int | None:
    """Number of the first document whose text differs; None for the same documents in the same order."""
    import numpy as np

    from grist_data.document_index import PIECE_DOCUMENTS

    both = min(one.n_docs, other.n_docs)
    for at in range(0, both, PIECE_DOCUMENTS):
        until = min(both, at + PIECE_DOCUMENTS)
        unlike = (one.hashes(at, until) != other.hashes(at, until)).any(axis=1)
        if unlike.any():
            return at + int(np.argmax(unlike))
    return None if one.n_docs == other.n_docs else both


def _of_tokens(split: str, a: Shards, b: Shards) -> list[str]:
    """Of the same documents under the same tokenizer: the first token that differs, a missing one included."""
    import numpy as np
    from tqdm import tqdm

    from grist_data.document_index import DocumentIndex

    both = min(a.n_tokens, b.n_tokens)
    first = both if a.n_tokens != b.n_tokens else None
    with tqdm(total=both, desc=f"comparing {split}", unit=" tokens", unit_scale=True, disable=None, leave=False) as bar:
        for at in range(0, both, _PIECE_TOKENS):
            n = min(_PIECE_TOKENS, both - at)
            unlike = a.read(at, n) != b.read(at, n)
            if unlike.any():
                first = at + int(np.argmax(unlike))
                break
            bar.update(n)
    if first is not None:
        return [
            f"split {split}: the same texts, but token {first:,} differs, in document"
            f" {_document_of(DocumentIndex(a), first):,}: encoded by another engine, or with other special tokens"
        ]
    for at in range(0, both if a.has_loss_mask or b.has_loss_mask else 0, _PIECE_TOKENS):
        n = min(_PIECE_TOKENS, both - at)
        unlike = a.trained(at, n) != b.trained(at, n)
        if unlike.any():
            first = at + int(np.argmax(unlike))
            return [
                f"split {split}: the same tokens, but others are trained: the first is token {first:,}, in document"
                f" {_document_of(DocumentIndex(a), first):,}"
            ]
    ends_differ = any((x.size != y.size) or (x != y).any() for x, y in _ends(a, b))
    return [f"split {split}: the same texts and tokens, but documents end at other tokens"] if ends_differ else []


def _ends(a: Shards, b: Shards) -> Any:
    from grist_data.document_index import PIECE_DOCUMENTS, DocumentIndex

    one, other = DocumentIndex(a), DocumentIndex(b)
    for at in range(0, one.n_docs, PIECE_DOCUMENTS):
        yield tuple(index.ends(at, min(one.n_docs, at + PIECE_DOCUMENTS)) for index in (one, other))


def _document_of(index: Any, token: int) -> int:
    """Number of the document that has a token: the first that ends behind it."""
    low, high = 0, index.n_docs - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if int(index.ends(middle, middle + 1)[0]) > token else (middle + 1, high)
    return low


def main(arguments: list[str] | None = None) -> int:
    parser = parser_for("diff", __doc__)
    parser.add_argument("first", metavar="DATASET")
    parser.add_argument("second", metavar="DATASET")
    options = parser.parse_args(arguments)

    def action() -> int:
        lines = differences(options.first, options.second)
        print("\n".join(lines) if lines else f"{options.first} and {options.second} are the same dataset")
        return 1 if lines else 0

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main())
