"""The documents of a split by number, over all its shards: where they end, and the hashes of their texts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from grist_data.shards import Shards

PIECE_DOCUMENTS = 1 << 18
_BUCKET_DOCUMENTS = 1 << 22  # 64 MB of hashes


class DocumentIndex:
    """n_docs: of the split. Nothing is held in memory but what is asked for."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards.shards
        counts = [shard.header.n_docs for shard in self._shards]
        self._firsts = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
        sizes = [shard.header.n_tokens for shard in self._shards]
        self._begins = [0, *np.cumsum(sizes, dtype=np.int64).tolist()]
        self.n_docs: int = self._firsts[-1]

    def ends(self, first: int, last: int) -> np.ndarray:
        """Where documents [first, last) end, in tokens of the split: int64."""
        found = [self._shards[k].doc_ends[a:b] + self._begins[k] for k, a, b in self._spans(first, last)]
        return np.concatenate(found or [np.zeros(0, np.int64)])

    def span(self, number: int) -> tuple[int, int]:
        """The tokens [start, stop) of a document."""
        begin, end = self.ends(max(0, number - 1), number + 1).tolist() if number else (0, int(self.ends(0, 1)[0]))
        return begin, end

    def spans(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens [start, stop) of many documents, in any order: two arrays of int64."""
        starts, stops = np.empty(len(numbers), np.int64), np.empty(len(numbers), np.int64)
        of = np.searchsorted(self._firsts, numbers, side="right") - 1
        for k in np.unique(of).tolist():
            chosen = of == k
            ends, local = self._shards[k].doc_ends, numbers[chosen] - self._firsts[k]
            stops[chosen] = ends[local] + self._begins[k]
            starts[chosen] = np.where(local > 0, ends[local - 1], 0) + self._begins[k]
        return starts, stops

    def hashes(self, first: int, last: int) -> np.ndarray:
        """(last - first, 16) uint8."""
        found = [self._shards[k].doc_hashes[a:b] for k, a, b in self._spans(first, last)]
        return np.concatenate(found or [np.zeros((0, 16), np.uint8)])

    def lengths(self) -> Iterator[np.ndarray]:
        """Tokens of every document, in pieces."""
        for shard in self._shards:
            start = 0
            for at in range(0, shard.header.n_docs, PIECE_DOCUMENTS):
                ends = shard.doc_ends[at : at + PIECE_DOCUMENTS]
                yield np.diff(ends, prepend=start)
                start = int(ends[-1])

    def bucket(self, bucket: int, n_buckets: int) -> np.ndarray:
        """Hashes of the texts whose hash falls into a bucket, sorted, copies kept: (n,) bytes of length 16."""
        found = []
        for at in range(0, self.n_docs, PIECE_DOCUMENTS):
            hashes = self.hashes(at, min(self.n_docs, at + PIECE_DOCUMENTS))
            of = np.ascontiguousarray(hashes[:, :4]).view("<u4")[:, 0] % n_buckets
            found.append(np.ascontiguousarray(hashes[of == bucket]).view("S16")[:, 0])
        return np.sort(np.concatenate(found or [np.zeros(0, "S16")]))

    def _spans(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, last in it) of documents [first, last)."""
        for k, (begin, end) in enumerate(zip(self._firsts, self._firsts[1:], strict=False)):
            if begin < last and end > first:
                yield k, max(first, begin) - begin, min(last, end) - begin


def common_documents(one: DocumentIndex, other: DocumentIndex) -> int:
    """How many documents have their text in both, a text that comes several times as often as in the rarer of the two.

    Reads the hashes bucket by bucket, so that memory stays flat.
    """
    n_buckets = max(1, -(-max(one.n_docs, other.n_docs) // _BUCKET_DOCUMENTS))
    common = 0
    for bucket in range(n_buckets):
        (a, counts_a), (b, counts_b) = (
            np.unique(index.bucket(bucket, n_buckets), return_counts=True) for index in (one, other)
        )
        _, at_a, at_b = np.intersect1d(a, b, assume_unique=True, return_indices=True)
        common += int(np.minimum(counts_a[at_a], counts_b[at_b]).sum())
    return common
