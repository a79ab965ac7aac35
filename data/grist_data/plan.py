"""From the surveys of all spans to what is encoded: which documents stay, how they are cut into units, who is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash

from grist_data.atomic import canonical_json
from grist_data.survey import KEPT, Survey, split_hash

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Unit:
    """Documents that are encoded as one: those that stay of the documents [first, stop) of a span.

    digest: xxh3_128 over their hashes, in hex.
    """

    span: int
    first: int
    stop: int
    documents: int
    text_bytes: int
    digest: str


@dataclass(frozen=True)
class Plan:
    """What is fixed before anything is encoded; plain values, the same on any number of processes.

    spans: digest of the list of spans. lowest, highest: smallest and largest split hash of any document that stays.
    dropped: reason -> documents and bytes. replaced: documents and characters that the source could not read as they are.
    """

    units: tuple[Unit, ...]
    spans: str
    lowest: int
    highest: int
    dropped: dict[str, dict[str, int]]
    replaced: dict[str, int]

    @property
    def documents(self) -> int:
        return sum(unit.documents for unit in self.units)

    @property
    def text_bytes(self) -> int:
        return sum(unit.text_bytes for unit in self.units)

    def digest(self) -> str:
        """sha256 of the list of units: the shards' record of what text they were made from."""
        units = [{key: getattr(unit, key) for key in ("documents", "text_bytes", "digest")} for unit in self.units]
        return hashlib.sha256(canonical_json(units)).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"units": [list(asdict(unit).values()) for unit in self.units]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        plain: dict[str, Any] = {**values, "units": tuple(Unit(*unit) for unit in values["units"])}
        return cls(**plain)


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

    def held_out(self, split_hashes: np.ndarray) -> np.ndarray:
        """(n,) bool for (n,) uint64."""
        return split_hashes < np.uint64(self.threshold)


def make_plan(
    surveys: Callable[[], Iterator[Survey]],
    spans: str,
    unit_bytes: int,
    later: np.ndarray | None = None,
    write_dropped: Callable[[int, np.ndarray], None] | None = None,
) -> Plan:
    """surveys: yields those of all spans in order, the same whenever it is called; one at a time is in memory.

    spans: digest of their list. later: of the documents of all surveys that stay, in order, (documents,) uint8, KEPT or why
    they go, too (`duplicates.later_reasons`). write_dropped: called with the number of a span and (n,) uint8, the reasons of
    all its documents, where `later` changes any. Raises ValueError when no document stays.
    """
    units: list[Unit] = []
    dropped: dict[str, dict[str, int]] = {}
    replaced = {"documents": 0, "characters": 0}
    lowest, highest, seen = 1 << 64, -1, 0
    for number, survey in enumerate(surveys()):
        reasons = survey.reasons
        if later is not None:
            kept = np.flatnonzero(reasons == KEPT)
            of_span = later[seen : seen + len(kept)]
            seen += len(kept)
            if of_span.any():
                reasons = reasons.copy()
                reasons[kept] = of_span
                if write_dropped is not None:
                    write_dropped(number, reasons)
        stays = reasons == KEPT
        if stays.any():
            lowest = min(lowest, int(survey.split_hashes[stays].min()))
            highest = max(highest, int(survey.split_hashes[stays].max()))
        _count(survey, reasons, dropped, replaced)
        units += _units(number, survey, stays, unit_bytes)
    if not units:
        why = ", ".join(f"{counts['documents']:,} {reason}" for reason, counts in sorted(dropped.items()))
        raise ValueError(
            "the corpus is empty: the source gave no document with a visible character that stays"
            + (f" (left out: {why})" if why else "")
        )
    return Plan(tuple(units), spans, lowest, highest, dict(sorted(dropped.items())), replaced)


def _count(survey: Survey, reasons: np.ndarray, dropped: dict[str, dict[str, int]], replaced: dict[str, int]) -> None:
    documents = np.bincount(reasons, minlength=len(survey.names))
    text_bytes = np.bincount(reasons, weights=survey.text_bytes, minlength=len(survey.names))
    for code in np.flatnonzero(documents).tolist():
        if code != KEPT:
            counts = dropped.setdefault(survey.names[code], {"documents": 0, "text_bytes": 0})
            counts["documents"] += int(documents[code])
            counts["text_bytes"] += int(text_bytes[code])
    characters = survey.replaced[reasons == KEPT]
    replaced["documents"] += int((characters > 0).sum())
    replaced["characters"] += int(characters.sum())


def _units(span: int, survey: Survey, stays: np.ndarray, unit_bytes: int) -> Iterator[Unit]:
    """Units of at least `unit_bytes` each; the last of a span may be smaller."""
    places = np.flatnonzero(stays)
    ends = np.cumsum(survey.text_bytes[places], dtype=np.int64)
    first = done = begin = 0
    while begin < len(places):
        end = min(int(ends.searchsorted(done + unit_bytes)) + 1, len(places))
        stop = len(survey) if end == len(places) else int(places[end - 1]) + 1
        digest = xxhash.xxh3_128_hexdigest(survey.hashes[places[begin:end]].tobytes())
        yield Unit(span, first, stop, end - begin, int(ends[end - 1]) - done, digest)
        first, done, begin = stop, int(ends[end - 1]), end


def decide_split(plan: Plan, val_fraction: float, seed: int) -> Split:
    """Raises ValueError when there is only one text and one is to be held out."""
    if val_fraction == 0:
        return Split(seed, 0, adjusted=False)
    if plan.lowest == plan.highest:
        copies = "" if plan.documents == 1 else f" ({plan.documents} copies of it)"
        raise ValueError(
            f"the corpus is a single document{copies}, so none can be held out: divide it with the option separator (of the"
            " files source), or set val_fraction to 0 for no validation split"
        )
    asked = int(val_fraction * 2**64)
    threshold = min(max(asked, plan.lowest + 1), plan.highest)
    return Split(seed, threshold, adjusted=threshold != asked)
