"""One writer at a time in a directory. The system drops the lock when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LOCK_FILE = ".lock"


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[BinaryIO]:
    """Hold the directory's lock; wait, and say so, while another process has it.

    Yields the open file: a process that inherits it holds the lock, too, for as long as it lives.
    """
    with open(directory / LOCK_FILE, "ab") as file:
        if not _try_lock(file):
            print(f"waiting for another process that writes {directory}", file=sys.stderr)
            while not _try_lock(file):
                time.sleep(0.2)
        yield file


def _try_lock(file: BinaryIO) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        print(f"{file.name}: this file system has no locks; do not prepare here twice at once", file=sys.stderr)
    return True
