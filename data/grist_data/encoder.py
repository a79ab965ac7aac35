"""The engine that turns the texts of a unit into ids, and what it says of itself in the unit's part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grist_data.engines import encode_checked, open_engine
from grist_data.survey import HASH_BYTES
from grist_data.tokenizer import Tokenizer

# What another engine than the reference encodes is encoded by both in so many bytes of text, which are chosen at random: the
# reference takes a hundred times as long as the fastest engine. At least a thousandth, and never more than a tenth.
_CHECKED_BYTES = 2 << 20
_LEAST, _MOST = 0.001, 0.1


@dataclass(frozen=True)
class Encoded:
    """ids: uint32, of each text. facts: JSON values for the part that the ids go into."""

    ids: list[np.ndarray]
    facts: dict[str, Any]


class Encoder:
    """name: of the engine. text_bytes: of the whole corpus, which decides how much is checked. Raises as `open_engine`."""

    def __init__(self, tokenizer: Tokenizer, name: str, text_bytes: int) -> None:
        self._tokenizer, self._engine = tokenizer, open_engine(tokenizer, name)
        self._share = min(max(_CHECKED_BYTES / max(text_bytes, 1), _LEAST), _MOST)
        self._facts = {key: getattr(self._engine, key) for key in ("name", "version", "unicode_version")}

    def encode(self, texts: Sequence[str], hashes: bytes) -> Encoded:
        """hashes: 16 bytes of each text."""
        each = [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
        ids, checked, mismatches = encode_checked(self._engine, self._tokenizer, texts, each, self._share)
        return Encoded(ids, {"engine": self._facts, "checked": checked, "mismatches": mismatches})


def encoding_facts(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For dataset.json: each engine with the documents that it encoded, that were checked, and that differed."""
    engines: dict[tuple[str, ...], dict[str, Any]] = {}
    for part in parts:
        facts = engines.setdefault(tuple(map(str, part["engine"].values())), part["engine"] | dict.fromkeys(_COUNTS, 0))
        documents = sum(counts["documents"] for counts in part["splits"].values())
        for key, count in zip(_COUNTS, (documents, part["checked"], part["mismatches"]), strict=True):
            facts[key] += count
    return [engines[key] for key in sorted(engines)]


_COUNTS = ("documents", "checked", "mismatches")
