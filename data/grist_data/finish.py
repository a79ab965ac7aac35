"""The last steps of a dataset that was not prepared from text: its manifest, and a reading of every byte of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grist_data.manifest import TRAINED, write_manifest
from grist_data.verify import problems_of

COUNTS = ("tokens", "documents", "text_bytes")


def totals(parts: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens, documents and bytes of text of several shards, splits or datasets together; where one of them has a loss mask,
    trained tokens, too.
    """
    counts = {key: sum(part[key] for part in parts) for key in COUNTS}
    if any(TRAINED in part for part in parts):
        counts[TRAINED] = sum(part.get(TRAINED, part["tokens"]) for part in parts)
    return counts


def finish(directory: Path, splits: dict[str, Any], tokenizer: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write dataset.json into a directory that has shards and tokenizer.

    splits, tokenizer: as in dataset.json. facts: its source and settings. Raises OSError when what is on the disk is not
    what was written.
    """
    write_manifest(directory, splits, tokenizer, facts)
    if problems := problems_of(directory):
        raise OSError("the dataset was written, but does not read back: " + "; ".join(problems))


def summary(splits: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {facts['tokens']:,} tokens"
        + (f" ({facts[TRAINED]:,} trained)" if TRAINED in facts else "")
        + f" of {facts['documents']:,} documents"
        for name, facts in splits.items()
    )
