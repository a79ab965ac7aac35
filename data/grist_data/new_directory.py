"""Directories that are whole or absent: filled under a temporary name beside their own, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from grist_data.atomic import PART_SUFFIX, sync_directory
from grist_data.lock import LOCK_FILE, exclusive


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, that becomes `out` when the block ends well; on an error or Ctrl-C nothing is left behind.

    What a killed process left under the temporary name is removed first.
    Raises FileExistsError when `out` is there and not empty.
    """
    out = Path(out).absolute()
    part = out.with_name(out.name + PART_SUFFIX)
    _refuse_existing(out)
    part.mkdir(parents=True, exist_ok=True)
    with exclusive(part):
        _refuse_existing(out)  # another process may have finished it while this one waited
        part.mkdir(exist_ok=True)  # or failed, and taken the directory away
        _clear(part)
        try:
            yield part
            (part / LOCK_FILE).unlink(missing_ok=True)
            os.rename(part, out)
            sync_directory(out.parent)
        except BaseException:
            shutil.rmtree(part)
            raise


def _refuse_existing(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists already: give another name, or remove it first")


def _clear(directory: Path) -> None:
    for left in directory.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != LOCK_FILE:
            left.unlink()
