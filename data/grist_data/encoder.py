"""The engine that turns the texts of a unit into ids, and what it says of itself in the unit's part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from grist_data.chat_layout import Layouts, TrainOn
from grist_data.chat_template import encode_conversations, layouts_of
from grist_data.document import Document
from grist_data.engines import encode_checked, open_engine
from grist_data.survey import HASH_BYTES
from grist_data.tokenizer import Tokenizer

# What another engine than the reference encodes is encoded by both in so many bytes of text, which are chosen at random: the
# reference takes a hundred times as long as the fastest engine. At least a thousandth, and never more than a tenth.
_CHECKED_BYTES = 2 << 20
_LEAST, _MOST = 0.001, 0.1


@dataclass(frozen=True)
class Encoded:
    """ids: integers, of each document. facts: JSON values for the part that the ids go into. trained: bool, of conversations
    which of the ids the model has to say.
    """

    ids: list[np.ndarray]
    facts: dict[str, Any]
    trained: list[np.ndarray] | None = None


class Encoder:
    """name: of the engine. text_bytes: of the whole corpus, which decides how much is checked. train_on: for a corpus of
    conversations. Raises as `open_engine`, and ValueError for a tokenizer without the template that conversations need.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, text_bytes: int, train_on: TrainOn | None = None) -> None:
        self._tokenizer, self._engine = tokenizer, open_engine(tokenizer, name)
        self._share = min(max(_CHECKED_BYTES / max(text_bytes, 1), _LEAST), _MOST)
        self._layouts = None if train_on is None else layouts_of(tokenizer, train_on=train_on)
        self._facts = {key: getattr(self._engine, key) for key in ("name", "version", "unicode_version")}

    def encode(self, documents: Sequence[Document], hashes: bytes) -> Encoded:
        """hashes: 16 bytes of each text. Raises ValueError for plain text among conversations, and the other way round."""
        kinds = ("plain text", "a conversation")
        for document in documents:
            if (document.messages is None) != (self._layouts is None):
                found, expected = kinds if document.messages is None else kinds[::-1]
                raise ValueError(
                    f"document {document.id} is {found}, but its source should give {expected} (CONVERSATIONS in"
                    " grist_data.sources lists which sources do)"
                )
        if self._layouts is not None:
            return self._conversations(self._layouts, documents)
        texts = [document.text for document in documents]
        each = [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
        ids, checked, mismatches = encode_checked(self._engine, self._tokenizer, texts, each, self._share)
        return Encoded(ids, {"engine": self._facts, "checked": checked, "mismatches": mismatches})

    def _conversations(self, layouts: Layouts, documents: Sequence[Document]) -> Encoded:
        """The texts between special tokens are what an engine encodes, and what is checked."""
        counts = {"checked": 0, "mismatches": 0}

        def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
            each = [xxhash.xxh3_128_digest(text.encode()) for text in texts]
            ids, counts["checked"], counts["mismatches"] = encode_checked(
                self._engine, self._tokenizer, texts, each, self._share
            )
            return ids

        conversations = [(document.messages or (), 0) for document in documents]
        tokens = encode_conversations(layouts, conversations, encode_batch, [document.id for document in documents])
        facts = {"engine": self._facts, **counts}
        return Encoded([each.ids for each in tokens], facts, [each.trained for each in tokens])


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
