"""Near-duplicates: MinHash signatures (Broder 1997), banded to find candidates (Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", section 3.4).

The share of equal numbers in two signatures estimates the Jaccard similarity J of the documents' sets of shingles, with
a standard error of sqrt(J (1 - J) / num_perm).
"""

from __future__ import annotations

import itertools

import numpy as np

from grist_data.cleaning.settings import CleanConfig
from grist_data.cleaning.words import WordHashes, tokens

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd; any would do, what it multiplies is random already
_RECALL = 0.95
_ROWS_AT_ONCE = 1 << 18


def signature(text: str, config: CleanConfig, hashes: WordHashes) -> np.ndarray:
    """(num_perm,) uint32: R-MinHash of rensa over the text's sequences of `shingle` words, whatever their case.

    A text of fewer words has one shingle, all of it.
    """
    from rensa import RMinHash  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    words = tokens(text) or [text]  # without any word, only the same text is alike
    hashes_N = hashes.of(words)
    size = min(config.shingle, len(words))
    shingles = hashes_N[: len(words) - size + 1]
    for k in range(1, size):
        shingles = shingles * _FACTOR + hashes_N[k : len(words) - size + 1 + k]
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, [0, len(shingles)], config.num_perm, config.minhash_seed
    )
    return np.array(matrix.to_rows()[0], np.uint32)


def near_duplicates(signatures: np.ndarray, config: CleanConfig, kept: np.ndarray | None = None) -> np.ndarray:
    """Which documents to leave out: those that resemble an earlier document that stays.

    signatures: (n, num_perm) uint32, in the order of the documents; it may be a memory map. kept: (n,) bool, False for
    documents that are left out anyway: these are not judged, and nothing is left out because of them.
    Returns (n,) bool. Every document left out has an earlier one that stays, with an estimated similarity of at least
    `threshold`; the first of a cluster always stays. A pair at the threshold is compared with a probability of at least
    0.95, a more similar one with a higher. Memory: about 60 bytes a document, and as many for each band that it shares.
    Time grows with the pairs that share a band and are not alike: thousands of pages of one template, just below the
    threshold, are all compared with each other.
    """
    n = len(signatures)
    if signatures.ndim != 2 or signatures.shape[1] != config.num_perm:
        raise ValueError(f"signatures must have the shape (n, num_perm {config.num_perm}), but have {signatures.shape}")
    if kept is not None and kept.shape != (n,):
        raise ValueError(f"kept must have the shape ({n},), but has {kept.shape}")
    documents, buckets = _shared_buckets(signatures, _rows_per_band(config), kept)
    dropped = np.zeros(n, bool)
    staying: dict[int, list[int]] = {}  # bucket -> documents of it that stay, which are few: the others resemble them
    edges = np.flatnonzero(np.diff(documents, prepend=-1, append=-1))
    for begin, end in itertools.pairwise(edges):
        document, own = int(documents[begin]), buckets[begin:end].tolist()
        earlier = {other for bucket in own for other in staying.get(bucket, ())}
        if earlier and _similarity(signatures, document, sorted(earlier)).max() >= config.threshold:
            dropped[document] = True
        else:
            for bucket in own:
                staying.setdefault(bucket, []).append(document)
    return dropped


def _similarity(signatures: np.ndarray, document: int, others: list[int]) -> np.ndarray:
    return (signatures[others] == signatures[document]).mean(axis=1)


def _rows_per_band(config: CleanConfig) -> int:
    """As many numbers to a band as still find a pair at the threshold with probability 0.95: 1 - (1 - s^rows)^bands."""
    rows = 1
    while rows < config.num_perm:
        bands = config.num_perm // (rows + 1)
        if 1 - (1 - config.threshold ** (rows + 1)) ** bands < _RECALL:
            break
        rows += 1
    return rows


def _shared_buckets(signatures: np.ndarray, rows: int, kept: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Every (document, bucket) where the bucket, a band with its value, is shared by several; sorted by document.

    Different values of a band may meet in one bucket, when their hashes are equal: a candidate more, nothing worse.
    """
    considered = np.arange(len(signatures)) if kept is None else np.flatnonzero(kept)
    documents, buckets, n_buckets = [], [], 0
    for band in range(signatures.shape[1] // rows):
        keys = _band_keys(signatures, band * rows, rows, considered)
        order = np.argsort(keys)
        keys = keys[order]
        is_new = np.ones(len(keys) + 1, bool)
        np.not_equal(keys[1:], keys[:-1], out=is_new[1:-1])
        shared = ~(is_new[:-1] & is_new[1:])
        documents.append(considered[order[shared]])
        buckets.append(np.cumsum(is_new[:-1][shared]) + n_buckets)
        n_buckets += len(keys)
    all_documents, all_buckets = np.concatenate(documents), np.concatenate(buckets)
    by_document = np.argsort(all_documents)
    return all_documents[by_document], all_buckets[by_document]


def _band_keys(signatures: np.ndarray, first: int, rows: int, considered: np.ndarray) -> np.ndarray:
    keys = np.zeros(len(considered), np.uint64)
    for begin in range(0, len(considered), _ROWS_AT_ONCE):
        part = slice(begin, begin + _ROWS_AT_ONCE)
        columns = signatures[considered[part], first : first + rows].astype(np.uint64)
        for k in range(rows):
            keys[part] = (keys[part] ^ columns[:, k]) * _FACTOR
            keys[part] ^= keys[part] >> np.uint64(32)
    return keys
