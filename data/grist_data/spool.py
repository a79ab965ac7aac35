"""A stream on the disk: read over the network once, then by every step of preparation and every process.

A source's `stream(state)` yields (document, state) from a state on (None: the beginning); state() is the JSON value from
which to go on after that document. Files of about `file_bytes` each hold a line of JSON a document; beside each is the state
after it, so that an interrupted reading goes on after the last whole file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grist_data.atomic import PART_SUFFIX, read_json, write_atomically
from grist_data.document import Document, Piece

_DONE = "done.json"

State = Any
Stream = Callable[[State], Iterator[tuple[Document, Callable[[], State]]]]


def fill(directory: Path, stream: Stream, file_bytes: int) -> None:
    """Write what is missing of the stream; nothing when it is all there."""
    directory.mkdir(exist_ok=True)
    if (directory / _DONE).is_file():
        return
    for unfinished in directory.glob(f"*{PART_SUFFIX}"):
        unfinished.unlink()
    number = 0
    while _state_file(directory, number).is_file():
        number += 1
    state = read_json(_state_file(directory, number - 1)) if number else None
    lines: list[bytes] = []
    size = 0
    with tqdm(desc="storing the stream", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        state_after: Callable[[], State] = dict
        for document, state_after in stream(state):
            line = json.dumps(document).encode() + b"\n"
            lines.append(line)
            size += len(line)
            bar.update(len(line))
            if size >= file_bytes:
                _write(directory, number, lines, state_after())
                number, lines, size = number + 1, [], 0
    if lines:
        _write(directory, number, lines, state_after())
        number += 1
    write_atomically(directory / _DONE, json.dumps({"files": number}).encode())


def pieces(directory: Path) -> list[Piece]:
    """Raises ValueError when the stream was not stored to its end."""
    if not (directory / _DONE).is_file():
        raise ValueError(f"{directory} does not hold the whole stream yet: run the step before again")
    files = [_file(directory, number) for number in range(read_json(directory / _DONE)["files"])]
    return [Piece(file.name, size=file.stat().st_size) for file in files]


def read(directory: Path, piece: Piece) -> Iterator[Document]:
    with open(directory / piece.name, "rb") as file:
        for line in file:
            yield Document(*json.loads(line))


def _write(directory: Path, number: int, lines: list[bytes], state: State) -> None:
    """The file first: with the state after it, it counts."""
    write_atomically(_file(directory, number), b"".join(lines))
    write_atomically(_state_file(directory, number), json.dumps(state).encode())


def _file(directory: Path, number: int) -> Path:
    return directory / f"{number:06d}.jsonl"


def _state_file(directory: Path, number: int) -> Path:
    return directory / f"{number:06d}.state"
