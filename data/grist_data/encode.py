"""Units of documents to parts: a part holds the tokens of a unit, and is there, under its name, when the unit is done."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from grist_data.atomic import canonical_json
from grist_data.document import Document
from grist_data.manifest import PARTS_DIRECTORY
from grist_data.plan import SPLITS, Plan, Split, Unit
from grist_data.record_file import read_facts, read_record, write_record
from grist_data.shard_header import Encoding
from grist_data.survey import HASH_BYTES, KEPT, Survey, utf8

if TYPE_CHECKING:
    from grist_data.encoder import Encoded, Encoder


@dataclass(frozen=True)
class Job:
    """What a unit is encoded by and for, the same for all units.

    chat: of a corpus of conversations, sha256 of the template, and what is trained; None for plain text.
    """

    out: Path
    encoding: Encoding
    plan: Plan
    split: Split
    chat: tuple[str, str] | None = None

    @cached_property
    def digest(self) -> str:
        """What a part has to agree with to be of this job."""
        own = [self.encoding.tokenizer_sha256, self.encoding.manifest_sha256, self.encoding.token_bytes]
        own += [self.encoding.eot_id if self.encoding.eot_appended else None, self.split.seed, self.split.threshold]
        return hashlib.sha256(canonical_json([*own, *(self.chat or ())])).hexdigest()


CHANGED = "the source is not what it was when this preparation began ({what}): start over with overwrite"


def encode_units(
    documents: Iterable[Document], survey: Survey, reasons: np.ndarray, units: Sequence[int], job: Job, encoder: Encoder
) -> Iterator[int]:
    """Encode units of one span and yield the number of each when its part is there.

    documents: those of the span, from its beginning. survey: of the span. reasons: (n,) why each is left out, KEPT for what is
    not. units: numbers, rising. Raises ValueError when the documents are not those of the survey.
    """
    source = iter(documents)
    at = 0
    for number in units:
        unit = job.plan.units[number]
        _skip(source, unit.first - at)
        texts = [
            document
            for document, reason in zip(
                itertools.islice(source, unit.stop - unit.first), reasons[unit.first : unit.stop].tolist(), strict=False
            )
            if reason == KEPT
        ]
        at = unit.stop
        if at == len(survey) and next(source, None) is not None:
            raise ValueError(CHANGED.format(what="there are more documents"))
        encode_unit(number, texts, survey, reasons, job, encoder)
        yield number


def _skip(source: Iterator[Document], n: int) -> None:
    next(itertools.islice(source, n, n), None)


def encode_unit(
    number: int, texts: list[Document], survey: Survey, reasons: np.ndarray, job: Job, encoder: Encoder
) -> None:
    unit = job.plan.units[number]
    kept = np.flatnonzero(reasons[unit.first : unit.stop] == KEPT) + unit.first
    encoded = [utf8(document) for document in texts]
    hashes = b"".join(map(xxhash.xxh3_128_digest, encoded))
    if hashes != survey.hashes[kept].tobytes():
        raise ValueError(CHANGED.format(what=_difference(number, texts, hashes, survey.hashes[kept])))
    result = encoder.encode(texts, hashes)
    write_part(number, unit, result, survey, kept, job)


def _difference(number: int, texts: list[Document], found: bytes, expected: np.ndarray) -> str:
    for k, document in enumerate(texts):
        if found[k * HASH_BYTES : (k + 1) * HASH_BYTES] != expected[k].tobytes():
            return f"unit {number} differs, from {document.id} on"
    return f"unit {number} has {len(texts):,} documents, not {len(expected):,}"


def write_part(number: int, unit: Unit, encoded: Encoded, survey: Survey, places: np.ndarray, job: Job) -> None:
    """places: of the encoded documents in the survey."""
    ids, trained = encoded.ids, encoded.trained
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    if job.encoding.eot_appended:
        assert job.encoding.eot_id is not None, "checked when the tokenizer was obtained"
        end = np.array([job.encoding.eot_id], np.uint32)
        # A template may have ended the conversation with it, as a token that the model has to say; ours is none.
        ends = [end if trained is None or of_one[-1:].tolist() != end.tolist() else end[:0] for of_one in ids]
        ids = [piece for of_one in zip(ids, ends, strict=True) for piece in of_one]
        lengths += np.fromiter(map(len, ends), np.int64, len(ends))
        if trained is not None:
            trained = [
                piece for of_one, e in zip(trained, ends, strict=True) for piece in (of_one, np.zeros(len(e), bool))
            ]
    tokens = np.concatenate(ids) if ids else np.zeros(0, np.uint32)
    if len(tokens) and int(tokens.max()) >= job.encoding.vocab_size:
        raise ValueError(f"token id {int(tokens.max())} is outside the vocabulary of {job.encoding.vocab_size} ids")
    stays = lengths > 0  # a normalizer may leave nothing of a text
    places, lengths = places[stays], lengths[stays]
    held_out = job.split.held_out(survey.split_hashes[places])
    masks = {} if trained is None else {"trained": np.concatenate(trained)}
    counts = {}
    for split, chosen in zip(SPLITS, (~held_out, held_out), strict=True):
        if chosen.any():
            counts[split] = {
                "tokens": int(lengths[chosen].sum()),
                "documents": int(chosen.sum()),
                "text_bytes": int(survey.text_bytes[places[chosen]].sum()),
            }
            if masks:
                counts[split]["trained_tokens"] = int(masks["trained"][np.repeat(chosen, lengths)].sum())
    write_record(
        part_file(job.out, number),
        {"unit": number, "job": job.digest, "splits": counts, **encoded.facts},
        {
            "tokens": tokens.astype(job.encoding.dtype),
            "lengths": lengths,
            "hashes": survey.hashes[places],
            "held_out": held_out,
            **masks,
        },
    )


def part_file(out: Path, number: int) -> Path:
    return out / PARTS_DIRECTORY / f"{number:06d}.rec"


def is_encoded(number: int, job: Job) -> bool:
    """Whether the part is there, whole, and of this job."""
    try:
        facts, _ = read_record(part_file(job.out, number))
    except (FileNotFoundError, ValueError):
        return False
    return facts["job"] == job.digest and facts["unit"] == number


def read_part_facts(number: int, job: Job) -> dict[str, Any]:
    """Raises FileNotFoundError for a unit that is not encoded, ValueError for a part of something else."""
    file = part_file(job.out, number)
    facts = read_facts(file)
    if facts["job"] != job.digest or facts["unit"] != number:
        raise ValueError(f"{file} is a part of another preparation: encode its unit again")
    return facts
