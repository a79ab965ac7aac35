"""Numbers about a split of a dataset, gathered piece by piece: lengths of documents, and how often each id occurs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from grist_data.document_index import DocumentIndex
from grist_data.shards import Shards

PERCENTILES = (5, 25, 50, 75, 95)
_PIECE_TOKENS = 1 << 20
# Lengths below this are counted one by one; there are never many above it, they are kept as they are.
_COUNTED_BELOW = 1 << 20


@dataclass(frozen=True)
class Lengths:
    """Tokens of documents. counts: (n,) int64, how many documents have each length below n. long: the others, sorted."""

    counts: np.ndarray
    long: np.ndarray

    @property
    def n_docs(self) -> int:
        return int(self.counts.sum()) + len(self.long)

    @property
    def mean(self) -> float:
        return (float(self.counts @ np.arange(len(self.counts))) + float(self.long.sum())) / self.n_docs

    def quantile(self, share: float) -> int:
        """The length that `share` of the documents do not exceed: 0 the shortest, 0.5 the (lower) median, 1 the longest."""
        rank = max(1, int(np.ceil(share * self.n_docs)))
        running = np.cumsum(self.counts)
        if rank <= running[-1]:
            return int(np.searchsorted(running, rank))
        return int(self.long[rank - 1 - int(running[-1])])

    def histogram(self, edges: np.ndarray) -> np.ndarray:
        """Documents in each bin [edges[k], edges[k + 1]): (len(edges) - 1,) int64; the last bin holds its edge as well."""
        found, _ = np.histogram(np.arange(len(self.counts)), edges, weights=self.counts)
        return found.astype(np.int64) + np.histogram(self.long, edges)[0]


def document_lengths(shards: Shards) -> Lengths:
    """Reads the ends of all documents. Memory does not grow with their number."""
    counts, long = np.zeros(_COUNTED_BELOW, np.int64), []
    for lengths in DocumentIndex(shards).lengths():
        counts += np.bincount(lengths[lengths < _COUNTED_BELOW], minlength=_COUNTED_BELOW)
        long.append(lengths[lengths >= _COUNTED_BELOW])
    return Lengths(counts, np.sort(np.concatenate(long or [np.zeros(0, np.int64)])))


def count_ids(shards: Shards) -> np.ndarray:
    """How often each id occurs: (V,) int64. Reads every token."""
    counts = np.zeros(shards.vocab_size, np.int64)
    bar = tqdm(
        total=shards.n_tokens,
        desc=f"counting {shards.split}",
        unit=" tokens",
        unit_scale=True,
        leave=False,
        disable=None,
    )
    with bar:
        for start in range(0, shards.n_tokens, _PIECE_TOKENS):
            ids = shards.read(start, min(_PIECE_TOKENS, shards.n_tokens - start))
            counts += np.bincount(ids, minlength=shards.vocab_size)
            bar.update(len(ids))
    return counts


def entropy_bits(counts: np.ndarray) -> float:
    """Bits a token under its own frequencies, -sum p log2 p: what a model that knows nothing else reaches."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
