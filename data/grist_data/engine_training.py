"""BPE merges learned by gigatoken: those of `tokenizers`, several times as fast, or None where that is not certain."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from grist_data.engine_base import forked
from grist_data.patterns import GPT2

# No byte of UTF-8, so that no text can hold it.
_SEPARATOR = b"\xff"


class StoredTexts:
    """Texts in a temporary file, so that they can be read by a library that wants files, and read again.

    Use it in a `with` statement. is_hard: a text holds a character about which gigatoken and the reference differ.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        from grist_data.engine_gigatoken import holds_disputed

        self._directory = tempfile.TemporaryDirectory()
        self.path = Path(self._directory.name) / "texts"
        self.is_hard = False
        try:
            with self.path.open("wb") as file:
                for text in texts:
                    self.is_hard = self.is_hard or holds_disputed(GPT2, text)
                    file.write(text.encode() + _SEPARATOR)
        except BaseException:
            self._directory.cleanup()
            raise

    def __enter__(self) -> StoredTexts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._directory.cleanup()

    def texts(self, containing: bytes = b"") -> Iterator[str]:
        """The texts again, in their order; only those whose UTF-8 holds some bytes."""
        if not self.path.stat().st_size:
            return
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = 0
            while start < len(content):
                found = content.find(containing, start) if containing else start
                if found < 0:
                    return
                start = content.rfind(_SEPARATOR, start, found) + 1 or start
                end = content.find(_SEPARATOR, found)
                yield content[start:end].decode()
                start = end + 1


def gigatoken_is_installed() -> bool:
    return importlib.util.find_spec("gigatoken") is not None


def learned_merges(texts: StoredTexts, n_merges: int) -> list[tuple[bytes, bytes]] | None:
    """Merges of byte strings with GPT-2's split, in their order; None where the reference may learn others, or has to do it.

    That is so for a text with a character that the two split differently, for two merges that give the same token, and in a
    forked process, where gigatoken would wait for threads that are not there.
    It does not stop at a least frequency, as the reference does: ask `is_frequent` about the last merge.
    """
    if texts.is_hard or n_merges == 0 or forked():
        return None
    train_bpe = importlib.import_module("gigatoken").train_bpe
    with _silent():
        _, merges = train_bpe(texts.path, 256 + n_merges, [], separator=_SEPARATOR)
    merges = [(bytes(left), bytes(right)) for left, right in merges]
    return merges if merges and len({left + right for left, right in merges}) == len(merges) else None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Away with what the library prints, past Python, on both standard streams."""
    kept = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(nowhere)
