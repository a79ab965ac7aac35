"""Documents that an earlier one makes superfluous: copies of its text, and texts that resemble it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from grist_data.cleaning import CleanConfig, near_duplicates
from grist_data.survey import DUPLICATE, KEPT, NEAR_DUPLICATE, Survey

Surveys = Callable[[], Iterator[Survey]]

# About 100 bytes each while they are sorted, 0.8 GB in all.
_HASHES_AT_ONCE = 8_000_000


def later_reasons(surveys: Surveys, exact: bool, clean: CleanConfig, directory: Path) -> np.ndarray | None:
    """Of the documents of all surveys that stay so far, in order: (documents,) uint8, KEPT or why they go, too.

    surveys: yields those of all spans in order, the same whenever it is called. exact: of documents with one text, only the
    first stays. directory: for a file of signatures, which may be larger than memory. None where neither is asked for.
    """
    if not exact and not clean.near_duplicates:
        return None
    n = sum(int((survey.reasons == KEPT).sum()) for survey in surveys())
    reasons = np.full(n, KEPT, np.uint8)
    if exact:
        reasons[later_copies(lambda: (survey.hashes[survey.reasons == KEPT] for survey in surveys()), n)] = DUPLICATE
    if clean.near_duplicates and n:
        file = directory / "signatures.bin"
        signatures = np.memmap(file, np.uint32, "w+", shape=(n, clean.num_perm))
        begin = 0
        for survey in surveys():
            signatures[begin : begin + len(survey.signatures)] = survey.signatures.reshape(-1, clean.num_perm)
            begin += len(survey.signatures)
        reasons[near_duplicates(signatures, clean, reasons == KEPT)] = NEAR_DUPLICATE
        file.unlink()
    return reasons


def later_copies(hashes: Callable[[], Iterator[np.ndarray]], n: int, at_once: int = _HASHES_AT_ONCE) -> np.ndarray:
    """(n,) bool: whether the same hash came before. Exact: all 128 bits are compared.

    hashes: yields blocks of (m, 16) uint8, n in all. Above `at_once` hashes they are gone through several times, each time for
    a share of all values, so that memory does not grow.
    """
    copies = np.zeros(n, bool)
    passes = -(-n // at_once)
    for share in range(passes):
        values, places, begin = [], [], 0
        for block in hashes():
            pair = np.ascontiguousarray(block).view("<u8")
            chosen = np.flatnonzero(pair[:, 0] % np.uint64(passes) == share) if passes > 1 else np.arange(len(pair))
            values.append(pair[chosen])
            places.append(chosen + begin)
            begin += len(pair)
        _mark(np.concatenate(values), np.concatenate(places), copies)
    return copies


def _mark(values: np.ndarray, places: np.ndarray, copies: np.ndarray) -> None:
    """values: (m, 2) uint64; places: (m,) rising."""
    order = np.lexsort((values[:, 1], values[:, 0]))  # stable: of equal values the first place comes first
    same = (values[order[1:]] == values[order[:-1]]).all(axis=1)
    copies[places[order[1:][same]]] = True
