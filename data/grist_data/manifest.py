"""`dataset.json`: written last, so a dataset exists when this file does, and checked whole when read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from grist_data.atomic import canonical_json, read_json, write_atomically

DATASET_FILE = "dataset.json"
JOURNAL_FILE = "journal.jsonl"
# Of an unfinished preparation: what it read, what it encoded, and a stream that it stored.
SURVEY_DIRECTORY, PARTS_DIRECTORY, SPOOL_DIRECTORY = WORK_DIRECTORIES = ("survey", "parts", "spool")
FORMAT = "gristmill-tokens"
VERSION = 1
# Of a split and its shards, where there is a loss mask: how many tokens count as targets.
TRAINED = "trained_tokens"
_CHECKSUM = "sha256_of_the_rest"


def dataset_id(splits: dict[str, Any], tokenizer_sha256: str) -> str:
    """Name of a dataset by its content: the same text, tokenizer and cut into shards give the same id anywhere."""
    roots = {split: [shard["root"] for shard in facts["shards"]] for split, facts in splits.items()}
    content = {"version": VERSION, "splits": roots, "tokenizer_sha256": tokenizer_sha256}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def write_manifest(directory: Path, splits: dict[str, Any], tokenizer: dict[str, Any], facts: dict[str, Any]) -> None:
    content = {
        "format": FORMAT,
        "version": VERSION,
        "dataset_id": dataset_id(splits, tokenizer["sha256"]),
        "splits": splits,
        "tokenizer": tokenizer,
        **facts,
    }
    content[_CHECKSUM] = hashlib.sha256(canonical_json(content)).hexdigest()
    data = json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
    write_atomically(directory / DATASET_FILE, data)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Raises FileNotFoundError where no dataset is, ValueError for an unfinished or damaged one."""
    file = directory / DATASET_FILE
    if not file.is_file():
        if (directory / JOURNAL_FILE).is_file():
            raise ValueError(
                f"the dataset in {directory} is not finished: run the command that prepares it again, it goes on from"
                " where it stopped"
            )
        raise FileNotFoundError(
            f"no dataset in {directory}: prepare one with python -m grist_data.prepare --out {directory}"
        )
    content = read_json(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{file} does not describe a dataset of this kind: expected format {FORMAT!r}")
    if content["version"] != VERSION:
        raise ValueError(f"{file} has version {content['version']}, but this program reads version {VERSION}")
    rest = {key: value for key, value in content.items() if key != _CHECKSUM}
    if content.get(_CHECKSUM) != hashlib.sha256(canonical_json(rest)).hexdigest():
        raise ValueError(f"{file} does not match its checksum: it was edited or damaged; prepare the dataset again")
    return content
