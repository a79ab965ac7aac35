"""Scores that are known already, so that a run that was stopped goes on where it was: lines of JSON, appended.

A file is of one model and one task; a line is of one row, whose hash covers all that was scored of it, examples included.
Each rank appends to a file of its own. A torn last line, from a process that was killed, is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO


def key_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hexadecimal."""
    spelled = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(spelled.encode()).hexdigest()


class ResultCache:
    """The results of one model on one task. directory: may be shared by any models and tasks; made when first written to."""

    def __init__(self, directory: str | Path, model_key: str, task: str, rank: int = 0):
        self.directory = Path(directory)
        self._stem = f"{task}-{model_key[:16]}"
        self._path = self.directory / f"{self._stem}.{rank}.jsonl"
        self._file: BinaryIO | None = None

    def known(self) -> dict[str, Any]:
        """Row hash -> result, from the files of all ranks.

        Raises:
            ValueError: a line other than the last of a file is not a result.
        """
        found: dict[str, Any] = {}
        for path in sorted(self.directory.glob(f"{self._stem}.*.jsonl")):
            lines = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or a torn line
                try:
                    entry = json.loads(line)
                    found[entry["row"]] = entry["result"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}:{number} is no result ({error}): delete the line or the file") from error
        return found

    def add(self, results: Mapping[str, Any]) -> None:
        """Append results by row hash; they are with the operating system when this returns."""
        if self._file is None:
            self._file = self._opened()
        lines = [json.dumps({"row": row, "result": result}) for row, result in results.items()]
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> BinaryIO:
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self._path.open("ab+")
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        if whole < size:
            file.truncate(whole)
        return file
