"""Read a source once, before anything is encoded: how much there is, how it is cut into units, and who is held out.

Which split a document falls into depends on the seed and its own text. So it stays there when documents are added, and
copies of a text are never divided between training and validation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import xxhash
from tqdm import tqdm

from grist_data.atomic import canonical_json
from grist_data.document import Document
from grist_data.permutation import hash64


@dataclass(frozen=True)
class Unit:
    """Consecutive documents that are encoded as one. digest: xxh3_128 over the documents' hashes, in hex."""

    documents: int
    text_bytes: int
    digest: str


@dataclass(frozen=True)
class Survey:
    """lowest, highest: smallest and largest split hash of any document."""

    units: list[Unit]
    lowest: int
    highest: int

    @property
    def documents(self) -> int:
        return sum(unit.documents for unit in self.units)

    @property
    def text_bytes(self) -> int:
        return sum(unit.text_bytes for unit in self.units)

    def digest(self) -> str:
        """sha256 of the list of units: the shards' record of what text they were made from."""
        return hashlib.sha256(canonical_json([asdict(unit) for unit in self.units])).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Survey:
        return cls([Unit(**unit) for unit in values["units"]], values["lowest"], values["highest"])


@dataclass(frozen=True)
class Split:
    """A document is held out when its split hash is below the threshold.

    adjusted: the fraction alone would have left a split empty, so the document with the lowest hash was moved to
    validation, or the one with the highest to training.
    """

    seed: int
    threshold: int
    adjusted: bool

    def name_of(self, text_hash: bytes) -> str:
        return "val" if split_hash(text_hash, self.seed) < self.threshold else "train"


def text_hash(document: Document) -> bytes:
    """xxh3_128 of the text. Raises ValueError for a text that UTF-8 cannot hold."""
    try:
        return xxhash.xxh3_128_digest(document.text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"document {document.id} holds half of a UTF-16 pair ({document.text[error.start]!r}), which is not text: use"
            " the source option errors=replace where there is one, or clean the text"
        ) from error


def split_hash(text_hash: bytes, seed: int) -> int:
    """Uniform in [0, 2^64)."""
    return hash64("split", seed, text_hash)


def take_survey(documents: Iterable[Document], unit_bytes: int, seed: int) -> Survey:
    """Raises ValueError when there is no document."""
    units: list[Unit] = []
    hashes, n_bytes = [], 0
    lowest, highest = 1 << 64, -1
    with tqdm(documents, desc="reading", unit=" texts", unit_scale=True, disable=None, leave=False) as bar:
        for document in bar:
            hashes.append(text_hash(document))
            n_bytes += len(document.text.encode())
            of_document = split_hash(hashes[-1], seed)
            lowest, highest = min(lowest, of_document), max(highest, of_document)
            if n_bytes >= unit_bytes:
                units.append(Unit(len(hashes), n_bytes, unit_digest(hashes)))
                hashes, n_bytes = [], 0
    if hashes:
        units.append(Unit(len(hashes), n_bytes, unit_digest(hashes)))
    if not units:
        raise ValueError("the corpus is empty: the source gave no document with a visible character")
    return Survey(units, lowest, highest)


def unit_digest(text_hashes: list[bytes]) -> str:
    return xxhash.xxh3_128_hexdigest(b"".join(text_hashes))


def decide_split(survey: Survey, val_fraction: float, seed: int) -> Split:
    """Raises ValueError when there is only one text and one is to be held out."""
    if val_fraction == 0:
        return Split(seed, 0, adjusted=False)
    if survey.lowest == survey.highest:
        copies = "" if survey.documents == 1 else f" ({survey.documents} copies of it)"
        raise ValueError(
            f"the corpus is a single document{copies}, so none can be held out: divide it with the option separator (of the"
            " files source), or set val_fraction to 0 for no validation split"
        )
    asked = int(val_fraction * 2**64)
    threshold = min(max(asked, survey.lowest + 1), survey.highest)
    return Split(seed, threshold, adjusted=threshold != asked)
