"""Read a span of a source before anything is encoded: of each document hash, size, and whether it is left out and why.

Which split a document falls into depends on the seed and its own text. So it stays there when documents are added, and
copies of a text are never divided between training and validation.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import xxhash

from grist_data.document import Document
from grist_data.permutation import hash64

HASH_BYTES = 16
# Places of these in `Survey.names`; what cleaning calls its reasons comes after them.
KEPT, EMPTY, DUPLICATE, NEAR_DUPLICATE = range(4)
REASONS = ("kept", "empty", "duplicate", "near_duplicate")


class Judge(Protocol):
    """What cleaning says of a text alone: why it is left out, or None; and what near-duplicates are found by, or None."""

    def reason(self, text: str) -> str | None: ...
    def signature(self, text: str) -> np.ndarray | None: ...


@dataclass(frozen=True)
class Survey:
    """The documents of a span, a row each, in order.

    hashes: (n, 16) uint8, xxh3_128 of the UTF-8 text. split_hashes: (n,) uint64. text_bytes: (n,) uint64, UTF-8; of a
    conversation, what people wrote.
    reasons: (n,) uint8, a place in `names`, KEPT for what stays. replaced: (n,) uint64, characters that the source could not
    read and replaced. signatures: (kept, width) uint32, of what stays here; width 0 where nobody asks for near-duplicates.
    """

    hashes: np.ndarray
    split_hashes: np.ndarray
    text_bytes: np.ndarray
    reasons: np.ndarray
    replaced: np.ndarray
    signatures: np.ndarray
    names: tuple[str, ...] = REASONS

    def __len__(self) -> int:
        return len(self.reasons)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in _ARRAYS}

    @classmethod
    def from_record(cls, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> Survey:
        return cls(**{name: arrays[name] for name in _ARRAYS}, names=tuple(facts["reasons"]))


_ARRAYS = ("hashes", "split_hashes", "text_bytes", "reasons", "replaced", "signatures")


def survey_documents(documents: Iterable[Document], seed: int, judge: Judge | None = None) -> Survey:
    """Raises ValueError for a text that UTF-8 cannot hold."""
    hashes, split_hashes, text_bytes = array("B"), array("Q"), array("Q")
    reasons, replaced = array("B"), array("Q")
    signatures: list[np.ndarray] = []
    codes = {name: code for code, name in enumerate(REASONS)}
    split_hash_of = split_hasher(seed)
    for document in documents:
        data = utf8(document)
        digest = xxhash.xxh3_128_digest(data)
        hashes.frombytes(digest)
        split_hashes.append(split_hash_of(digest))
        prose = document.prose
        text_bytes.append(len(data) if document.messages is None else len(prose.encode()))
        replaced.append(document.replaced)
        if not data or document.text.isspace():
            reasons.append(EMPTY)
        else:
            reason = None if judge is None else judge.reason(prose)
            reasons.append(KEPT if reason is None else codes.setdefault(reason, len(codes)))
            if judge is not None and reason is None and (signature := judge.signature(prose)) is not None:
                signatures.append(signature)
    return Survey(
        np.asarray(hashes).reshape(-1, HASH_BYTES),
        np.asarray(split_hashes),
        np.asarray(text_bytes),
        np.asarray(reasons),
        np.asarray(replaced),
        np.stack(signatures) if signatures else np.zeros((0, 0), np.uint32),
        tuple(codes),
    )


def utf8(document: Document) -> bytes:
    """Raises ValueError for a text that UTF-8 cannot hold."""
    try:
        return document.text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"document {document.id} holds half of a UTF-16 pair ({document.text[error.start]!r}), which is not text: use"
            " the source option errors=replace where there is one, or clean the text"
        ) from error


def text_hash(document: Document) -> bytes:
    """xxh3_128 of the text. Raises ValueError for a text that UTF-8 cannot hold."""
    return xxhash.xxh3_128_digest(utf8(document))


def split_hash(text_hash: bytes, seed: int) -> int:
    """Uniform in [0, 2^64)."""
    return hash64("split", seed, text_hash)


def split_hasher(seed: int) -> Callable[[bytes], int]:
    """`split_hash` for one seed: what does not change is framed once, as `hash64` frames it."""
    frame = b"b" + struct.pack("<Q", 5) + b"split" + b"i" + struct.pack("<Q", seed & (1 << 64) - 1)
    frame += b"b" + struct.pack("<Q", HASH_BYTES)
    return lambda text_hash: xxhash.xxh3_64_intdigest(frame + text_hash)
