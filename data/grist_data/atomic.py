"""Files that are whole or absent (written under a temporary name, synced, then renamed), and JSON."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PART_SUFFIX = ".part"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that gets its name only when the block ends well; on an error, nothing is left behind.

    Raises OSError (ENOSPC) with what to do when the disk is full.
    """
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_directory(path.parent)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"no space left while writing {path}; free some and run the same command again, it goes on from here"
            )
            raise OSError(error.errno, message) from error
        raise


def write_atomically(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def sync_directory(directory: Path) -> None:
    """Make a rename in the directory durable. Only POSIX lets a directory be opened and synced."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> Any:
    """Parse a JSON file; ValueError names the file."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that checksums are taken of: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
