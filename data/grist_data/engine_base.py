"""What all tokenization engines have in common: `tokenizers` is the reference, and a fast one gives the same ids."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from grist_data.tokenizer import Tokenizer, refuse_surrogates


@dataclass(frozen=True)
class Engine:
    """name, version: of the package. unicode_version: newest one whose letters it knows, from "12" on.

    encode: ids of each text, uint32, by the engine itself. is_hard: whether a text needs the reference.
    """

    name: str
    version: str
    unicode_version: str
    reference: Tokenizer
    encode: Callable[[Sequence[str]], list[np.ndarray]]
    is_hard: Callable[[str], bool]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as uint32 arrays, those of `Tokenizer.encode_batch`. Raises ValueError for a lone surrogate."""
        hard = [number for number, text in enumerate(texts) if self.is_hard(text)]
        by_reference = dict(zip(hard, self.reference.encode_batch([texts[number] for number in hard]), strict=True))
        easy = [text for number, text in enumerate(texts) if number not in by_reference] if hard else texts
        try:
            encoded = iter(self.encode(easy))
        except (TypeError, UnicodeEncodeError):  # what the libraries make of text that UTF-8 cannot hold
            refuse_surrogates(easy)
            raise
        return [by_reference[number] if number in by_reference else next(encoded) for number in range(len(texts))]


_FORKED = False


def _note_fork() -> None:
    global _FORKED
    _FORKED = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def forked() -> bool:
    """Whether this process was forked off one that had loaded this: threads that a library started there are missing here, and
    it may wait for them for ever."""
    return _FORKED


def threads() -> int:
    """How many an engine uses: one in a worker process or where TOKENIZERS_PARALLELISM=false, else one for every core."""
    off = os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "off", "no", "f", "n", "0")
    if off or forked() or multiprocessing.parent_process() is not None:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
