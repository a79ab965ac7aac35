"""Sums over the documents of a split, from batches that ranks score: nats, tokens and bytes of each document.

Shape letters: N documents of the split, S scored tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from grist_data.document_index import DocumentIndex

if TYPE_CHECKING:
    from grist_data import Shards, Tokenizer
    from grist_eval.questions import Ranks


class SpelledBytes:
    """UTF-8 bytes that tokens spell; special tokens are no text and spell none. Tokens are looked up when they first come."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._bytes_V = tokenizer, np.full(vocab_size, -1, np.int64)
        self._bytes_V[[i for i in tokenizer.special_tokens.values() if i < vocab_size]] = 0

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Bytes of each id. Raises ValueError where the tokenizer is not byte-level."""
        for i in np.unique(ids[self._bytes_V[ids] < 0]).tolist():
            self._bytes_V[i] = len(self._tokenizer.token_bytes([i]))
        return self._bytes_V[ids]


class _Part(NamedTuple):
    """What a batch adds to the documents from number `first` on."""

    batch: int
    first: int
    nats: np.ndarray
    tokens: np.ndarray
    n_bytes: np.ndarray


class DocumentSums:
    """Sums of the documents of a split that `evaluation_batches` goes through with the same sizes.

    spelled: None where there are no bytes to count: the split has a loss mask, or its tokenizer is not byte-level.
    """

    def __init__(
        self,
        shards: Shards,
        length: int,
        stride: int,
        batch_size: int,
        n_targets: int,
        spelled: SpelledBytes | None,
    ):
        self._shards, self._length, self._stride = shards, length, stride
        self._batch_size, self._n_targets, self._spelled = batch_size, n_targets, spelled
        index = DocumentIndex(shards)
        self._ends_N = index.ends(0, index.n_docs)
        self._parts: list[_Part] = []

    def add(self, batch: int, nll_S: np.ndarray, targets_S: np.ndarray) -> None:
        """The scores of batch number `batch` of all ranks: float32 nats and ids, in the order of its rows."""
        positions = self._positions(batch)
        if len(positions) != len(targets_S):
            raise AssertionError(f"batch {batch} scored {len(targets_S)} tokens, but stands for {len(positions)}")
        if not len(positions):
            return
        documents_S = self._ends_N.searchsorted(positions, side="right")
        first = int(documents_S[0])
        own_S = documents_S - first
        n_bytes = np.bincount(own_S, weights=self._spelled.of(targets_S)) if self._spelled else np.zeros(own_S[-1] + 1)
        nats = np.bincount(own_S, weights=nll_S.astype(np.float64))
        self._parts.append(_Part(batch, first, nats, np.bincount(own_S), n_bytes.astype(np.int64)))

    def _positions(self, batch: int) -> np.ndarray:
        """Where in the split the targets that a batch scores stand: without a loss mask they follow each other."""
        first = batch * self._batch_size
        start = 1 + (first * self._stride + self._length - self._stride if first else 0)
        stop = 1 + min(self._n_targets, (first + self._batch_size - 1) * self._stride + self._length)
        positions = np.arange(start, max(start, stop))
        if self._shards.has_loss_mask and len(positions):
            return positions[self._shards.trained(start, len(positions))]
        return positions

    def totals(self, ranks: Ranks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Nats float64, tokens and bytes int64, (N,) each, of all ranks, which call this together. Added in the order of the
        batches: the same bits on any number of ranks."""
        nats_N = np.zeros(len(self._ends_N))
        tokens_N, bytes_N = np.zeros(len(nats_N), np.int64), np.zeros(len(nats_N), np.int64)
        parts = sorted(
            (part for of_rank in ranks.gathered(self._parts) for part in of_rank), key=lambda part: part.batch
        )
        for part in parts:
            span = slice(part.first, part.first + len(part.nats))
            nats_N[span] += part.nats
            tokens_N[span] += part.tokens
            bytes_N[span] += part.n_bytes
        if self._spelled is not None and self._n_targets == self._shards.n_tokens - 1:
            # The first token is predicted from nothing and not scored, but is text of the split.
            bytes_N[self._ends_N.searchsorted(0, side="right")] += int(self._spelled.of(self._shards.read(0, 1))[0])
        return nats_N, tokens_N, bytes_N
