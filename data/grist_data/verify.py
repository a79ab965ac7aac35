"""Check every byte of a dataset against its checksums, and name the file and block of each that is wrong.

    python -m grist_data.verify DIRECTORY

Ends with status 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grist_data.manifest import read_manifest
from grist_data.shards import ShardFile, Shards
from grist_data.tokenizer import TEMPLATE_FILE


def problems_of(directory: str | Path) -> list[str]:
    """Everything wrong with a dataset, one message each; empty for a sound one. Speed: gigabytes a second from memory."""
    directory = Path(directory)
    try:
        manifest = read_manifest(directory)
    except (ValueError, OSError) as error:
        return [str(error)]
    problems: list[str] = []
    files = [shard["file"] for split in manifest["splits"].values() for shard in split["shards"]]
    for file in tqdm(files, desc="verifying", unit=" shards", disable=None, leave=False):
        try:
            problems += ShardFile(directory / file).problems()
        except (ValueError, OSError) as error:
            problems.append(str(error))
    problems += _template_problems(directory, manifest)
    for split in manifest["splits"]:
        try:
            Shards.open(directory, split)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def _template_problems(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """Of conversations: whether the template that they were written by is there."""
    if "conversations" not in manifest:
        return []
    file, expected = directory / TEMPLATE_FILE, manifest["conversations"]["chat_template_sha256"]
    found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no such file"
    if found == expected:
        return []
    return [
        f"{file} is not the chat template that the conversations were written by: {found}, expected sha256 {expected}"
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m grist_data.verify", description="Check every byte of a dataset.")
    parser.add_argument("directory")
    directory = parser.parse_args(arguments).directory
    problems = problems_of(directory)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"{directory}: every checksum matches")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
