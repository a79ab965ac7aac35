"""`journal.jsonl`: what is fixed about a preparation, a line each, so that any process can go on with it.

Lines, in this order: start (the settings), plan (the units that the text is cut into), tokenizer. What is done already the
files of surveys and parts say by being there. A line counts when it is whole, newline included.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from grist_data.atomic import PART_SUFFIX, sync_directory
from grist_data.manifest import JOURNAL_FILE

_VERSION = 2


class Journal:
    """plan, tokenizer_sha256: None until recorded. trained_by: what trained the tokenizer; None for one that was there."""

    def __init__(self, directory: Path, settings: dict[str, Any], writer: str = "") -> None:
        """Open or begin the journal. writer: tells those apart that may begin it at the same time.

        Raises ValueError when it was begun with other settings, by another version, or is damaged.
        """
        self._path = directory / JOURNAL_FILE
        lines = self._whole_lines() if self._path.is_file() else []
        self.plan: dict[str, Any] | None = None
        self.tokenizer_sha256: str | None = None
        self.trained_by: str | None = None
        if not lines:
            self._begin({"event": "start", "version": _VERSION, "settings": settings}, writer)
            return
        if lines[0].get("event") != "start" or lines[0].get("version") != _VERSION:
            raise ValueError(
                f"{self._path} is of version {lines[0].get('version')} of this program's journal, which is {_VERSION} now, so"
                " the preparation cannot go on: start over with overwrite"
            )
        refuse_other_settings(directory, "an unfinished dataset", lines[0]["settings"], settings)
        self._take(lines)

    def read_again(self) -> None:
        """See what another process has recorded since."""
        self._take(self._whole_lines())

    def record_plan(self, plan: dict[str, Any]) -> None:
        self._record({"event": "plan", "plan": plan})

    def record_tokenizer(self, sha256: str, trained_by: str | None) -> None:
        self._record({"event": "tokenizer", "sha256": sha256, "trained_by": trained_by})

    def _record(self, line: dict[str, Any]) -> None:
        self._cut_torn_line()
        with open(self._path, "ab") as file:
            _write_line(file.fileno(), line)
        self._take([line])

    def _begin(self, line: dict[str, Any], writer: str) -> None:
        """By rename: those who begin at the same time write the same, each under a name of its own."""
        part = self._path.with_name(f"{self._path.name}{writer}{PART_SUFFIX}")
        try:
            with open(part, "wb") as file:
                _write_line(file.fileno(), line)
            os.replace(part, self._path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_directory(self._path.parent)

    def _take(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["event"] == "plan":
                self.plan = line["plan"]
            elif line["event"] == "tokenizer":
                self.tokenizer_sha256, self.trained_by = line["sha256"], line["trained_by"]

    def _whole_lines(self) -> list[dict[str, Any]]:
        data = self._path.read_bytes()
        try:
            return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
        except ValueError as error:
            raise ValueError(f"{self._path} is damaged ({error}): start over with overwrite") from error

    def _cut_torn_line(self) -> None:
        """A last line that was being written when the process died."""
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self._path, whole)


def _write_line(handle: int, line: dict[str, Any]) -> None:
    data = json.dumps(line).encode() + b"\n"
    while data:
        data = data[os.write(handle, data) :]
    os.fsync(handle)


def refuse_other_settings(directory: Path, what: str, found: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise ValueError that lists what differs, when anything does."""
    differ = [key for key in {**found, **asked} if found.get(key) != asked.get(key)]
    if differ:
        changes = "; ".join(f"{key} was {found.get(key)!r}, now {asked.get(key)!r}" for key in differ)
        raise ValueError(
            f"{directory} holds {what} of other settings ({changes}): give another directory, or start over in this one"
            " with overwrite"
        )
