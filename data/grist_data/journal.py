"""`journal.jsonl`: what a preparation has finished, a line each, so that a killed one can go on.

Lines, in this order: start (the settings), survey (the units that the text is cut into), tokenizer, then one for each encoded
unit, in any order. A line counts when it is whole, newline included.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from grist_data.atomic import sync_directory
from grist_data.manifest import JOURNAL_FILE

_VERSION = 1


class Journal:
    """survey, tokenizer_sha256: None until recorded. units: number of the unit -> its parts."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        """Open or begin the journal. Raises ValueError when it was begun with other settings or is damaged."""
        self._path = directory / JOURNAL_FILE
        self.survey: dict[str, Any] | None = None
        self.tokenizer_sha256: str | None = None
        self.units: dict[int, dict[str, Any]] = {}
        lines = self._whole_lines() if self._path.is_file() else []
        if not lines:
            self._append({"event": "start", "version": _VERSION, "settings": settings})
            sync_directory(directory)
            return
        if lines[0].get("event") != "start" or lines[0].get("version") != _VERSION:
            raise ValueError(f"{self._path} is not a journal of version {_VERSION}: start over with overwrite")
        refuse_other_settings(directory, "an unfinished dataset", lines[0]["settings"], settings)
        for line in lines[1:]:
            self._take(line)

    def record_survey(self, survey: dict[str, Any]) -> None:
        self._record({"event": "survey", "survey": survey})

    def record_tokenizer(self, sha256: str) -> None:
        self._record({"event": "tokenizer", "sha256": sha256})

    def record_unit(self, number: int, parts: dict[str, Any]) -> None:
        self._record({"event": "unit", "unit": number, "parts": parts})

    def _record(self, line: dict[str, Any]) -> None:
        self._append(line)
        self._take(line)

    def _append(self, line: dict[str, Any]) -> None:
        with open(self._path, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _take(self, line: dict[str, Any]) -> None:
        if line["event"] == "survey":
            self.survey = line["survey"]
        elif line["event"] == "tokenizer":
            self.tokenizer_sha256 = line["sha256"]
        else:
            self.units[line["unit"]] = line["parts"]

    def _whole_lines(self) -> list[dict[str, Any]]:
        """Parse the file, and cut off a last line that was being written when the process died."""
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(f"{self._path} is damaged ({error}): start over with overwrite") from error
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))
        return lines


def refuse_other_settings(directory: Path, what: str, found: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise ValueError that lists what differs, when anything does."""
    differ = [key for key in {**found, **asked} if found.get(key) != asked.get(key)]
    if differ:
        changes = "; ".join(f"{key} was {found.get(key)!r}, now {asked.get(key)!r}" for key in differ)
        raise ValueError(
            f"{directory} holds {what} of other settings ({changes}): give another directory, or start over in this one"
            " with overwrite"
        )
