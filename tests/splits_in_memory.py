"""Splits of datasets without files: `Shards` over arrays, for tests of the order that need many sources of any size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from grist_data import Shards


def split_in_memory(
    name: str,
    shard_tokens: Sequence[int],
    first_id: int = 0,
    document_tokens: int = 7,
    tokenizer: str = "tokenizer",
    dtype: str = "<u4",
) -> Shards:
    """A training split with tokens first_id, first_id + 1, ... and documents of `document_tokens` tokens in every shard."""
    facts = {"tokens": sum(shard_tokens), "documents": 0, "text_bytes": 0}
    manifest: dict[str, Any] = {
        "splits": {"train": facts},
        "dataset_id": name,
        "tokenizer": {"sha256": tokenizer, "vocab_size": 1 << 31, "eot_id": None},
    }
    starts = first_id + np.concatenate([[0], np.cumsum(shard_tokens)[:-1]])
    shards: list[Any] = [
        _Shard(np.arange(start, start + n).astype(dtype), document_tokens)
        for start, n in zip(starts.tolist(), shard_tokens, strict=True)
    ]
    return Shards(Path(name), "train", manifest, shards)


class _Shard:
    """As much of `ShardFile` as reading needs."""

    def __init__(self, tokens: np.ndarray, document_tokens: int) -> None:
        self._tokens = tokens
        self.header = SimpleNamespace(
            n_tokens=len(tokens), file_bytes=tokens.nbytes, encoding=SimpleNamespace(dtype=tokens.dtype)
        )
        self.doc_ends = np.append(np.arange(document_tokens, len(tokens), document_tokens), len(tokens)).astype(
            np.int64
        )

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return self._tokens[start:stop]

    def will_need(self, start: int, stop: int) -> None:
        assert 0 <= start <= stop <= len(self._tokens)

    def expect(self, pattern: str) -> None:
        assert pattern in ("random", "sequential")
