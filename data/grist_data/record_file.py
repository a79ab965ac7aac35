"""A small file of facts and arrays under a checksum: what the steps and processes of a preparation hand to each other.

Magic, u32 length of a JSON head, the head, arrays (each at a multiple of 8), and xxh3_64 of all before it. Such a file has
its name when it is whole, but is not flushed to the disk: it can be made again, and after a power cut the sum tells.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from grist_data.atomic import PART_SUFFIX

_MAGIC = b"\x89REC\r\n\x1a\n"
_ALIGNMENT = 8
_SUM_BYTES = 8


def write_record(path: Path, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises OSError (ENOSPC) that says what to do when the disk is full."""
    shapes = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    head = json.dumps({"facts": facts, "arrays": shapes}, ensure_ascii=False).encode()
    digest = xxhash.xxh3_64()
    with _renamed_when_whole(path) as file:
        for data in (_MAGIC, struct.pack("<I", len(head)), head, *map(np.ascontiguousarray, arrays.values())):
            view = memoryview(data).cast("B") if len(data) else memoryview(b"")  # pyright: ignore[reportArgumentType]
            digest.update(view)
            file.write(view)
            if isinstance(data, np.ndarray) or data is head:
                padding = bytes(-file.tell() % _ALIGNMENT)
                digest.update(padding)
                file.write(padding)
        file.write(struct.pack("<Q", digest.intdigest()))


def read_record(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Facts, and the arrays as views of the mapped file. Raises FileNotFoundError, or ValueError for a damaged file."""
    with open(path, "rb") as file:
        head, offset = _read_head(file, path)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with memoryview(data) as view, view[:-_SUM_BYTES] as summed:
        if struct.unpack("<Q", view[-_SUM_BYTES:])[0] != xxhash.xxh3_64_intdigest(summed):
            raise ValueError(f"{path} does not match its checksum: remove it and run the same command again")
    arrays = {}
    for name, dtype, shape in head["arrays"]:
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(data, dtype, count, offset) if count else np.zeros(0, dtype)
        arrays[name] = array.reshape(shape)
        offset += _padded(array.nbytes)
    return head["facts"], arrays


def read_facts(path: Path) -> dict[str, Any]:
    """The facts alone, unchecked but for being JSON. Raises as `read_record`."""
    with open(path, "rb") as file:
        return _read_head(file, path)[0]["facts"]


def _read_head(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The head, and where the first array begins."""
    opening = file.read(len(_MAGIC) + 4)
    if len(opening) < len(_MAGIC) + 4 or opening[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"{path} is damaged: remove it and run the same command again")
    n_bytes = struct.unpack("<I", opening[len(_MAGIC) :])[0]
    try:
        head = json.loads(file.read(n_bytes))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: remove it and run the same command again") from error
    return head, _padded(len(opening) + n_bytes)


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


@contextlib.contextmanager
def _renamed_when_whole(path: Path) -> Iterator[BinaryIO]:
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"no space left while writing {path}; free some and run the same command again, it goes on from here"
            )
            raise OSError(error.errno, message) from error
        raise
