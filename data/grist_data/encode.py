"""From documents to shards: units are encoded into parts, each a small shard of its own, and parts are joined into shards."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from grist_data.document import Document
from grist_data.journal import Journal
from grist_data.shard_header import Encoding
from grist_data.shard_writer import write_shard
from grist_data.shards import ShardFile
from grist_data.survey import Split, Survey, Unit, text_hash, unit_digest
from grist_data.tokenizer import Tokenizer

SPLITS = ("train", "val")
PARTS_DIRECTORY = "parts"


@dataclass(frozen=True)
class Job:
    """What encoding a unit needs to know, the same for all units."""

    out: Path
    tokenizer: Tokenizer
    encoding: Encoding
    split: Split


def encode_units(documents: Iterable[Document], survey: Survey, job: Job, journal: Journal) -> None:
    """Encode every unit that the journal does not list, and list it.

    Raises ValueError when the documents are not those of the survey.
    """
    (job.out / PARTS_DIRECTORY).mkdir(exist_ok=True)
    source = iter(documents)
    n_tokens = 0
    with tqdm(total=survey.text_bytes, desc="encoding", unit="B", unit_scale=True, disable=None) as bar:
        for number, unit in enumerate(survey.units):
            texts = list(itertools.islice(source, unit.documents))
            if not _is_finished(number, job, journal):
                journal.record_unit(number, _encode_unit(number, unit, texts, job))
            n_tokens += sum(part["tokens"] for part in journal.units[number].values())
            bar.update(unit.text_bytes)
            bar.set_postfix_str(f"{n_tokens / 1e6 / max(bar.format_dict['elapsed'], 1e-3):.2f} M tokens/s")
        if next(source, None) is not None:
            raise ValueError(_CHANGED.format(what="there are more documents"))


_CHANGED = "the source is not what it was when this preparation began ({what}): start over with overwrite"


def _is_finished(number: int, job: Job, journal: Journal) -> bool:
    """Listed in the journal, and the parts are there, whole, and those that were listed."""
    if number not in journal.units:
        return False
    for split, facts in journal.units[number].items():
        path = _part(job.out, number, split)
        try:
            if f"{ShardFile(path, verify='full').header.root:016x}" != facts["root"]:
                return False
        except (FileNotFoundError, ValueError):
            return False
    return True


def _encode_unit(number: int, unit: Unit, texts: list[Document], job: Job) -> dict[str, Any]:
    hashes = [text_hash(document) for document in texts]
    if unit_digest(hashes) != unit.digest:
        where = f", from {texts[0].id} on" if texts else ""
        raise ValueError(_CHANGED.format(what=f"unit {number} differs{where}"))
    encoded = job.tokenizer.encode_batch([document.text for document in texts])
    parts = {}
    for split in SPLITS:
        chosen = [k for k in range(len(texts)) if job.split.name_of(hashes[k]) == split]
        ids = {k: _ended(encoded[k], job.encoding) for k in chosen}
        kept = [k for k in chosen if len(ids[k])]  # a normalizer may leave nothing of a text
        if kept:
            parts[split] = _write_part(number, split, [ids[k] for k in kept], [hashes[k] for k in kept], job) | {
                "text_bytes": sum(len(texts[k].text.encode()) for k in kept)
            }
    return parts


def _ended(ids: np.ndarray, encoding: Encoding) -> np.ndarray:
    if not encoding.eot_appended:
        return ids
    assert encoding.eot_id is not None, "checked when the tokenizer was obtained"
    return np.append(ids, np.uint32(encoding.eot_id))


def _write_part(number: int, split: str, ids: list[np.ndarray], hashes: list[bytes], job: Job) -> dict[str, Any]:
    doc_ends = np.cumsum([len(of_document) for of_document in ids])
    header = write_shard(_part(job.out, number, split), job.encoding, ids, doc_ends, b"".join(hashes), {"split": split})
    return {"tokens": header.n_tokens, "documents": header.n_docs, "root": f"{header.root:016x}"}


def _part(out: Path, number: int, split: str) -> Path:
    return out / PARTS_DIRECTORY / f"{number:06d}-{split}.tok"


def join_parts(job: Job, journal: Journal, shard_tokens: int) -> dict[str, Any]:
    """Write the shards of every split, each of whole units and at least `shard_tokens` tokens (but for the last).

    Returns `splits` of dataset.json. Shards that an interrupted call finished are kept.
    """
    groups = {split: list(_grouped(journal, split, shard_tokens)) for split in SPLITS}
    total = sum(journal.units[k][split]["tokens"] for split in SPLITS for group in groups[split] for k in group)
    splits = {}
    with tqdm(total=total, desc="writing shards", unit=" tokens", unit_scale=True, disable=None, leave=False) as bar:
        for split in SPLITS:
            shards = []
            for index, group in enumerate(groups[split]):
                facts = [journal.units[k][split] for k in group]
                totals = {key: sum(fact[key] for fact in facts) for key in ("tokens", "documents", "text_bytes")}
                path = job.out / f"{split}-{index:05d}-of-{len(groups[split]):05d}.tok"
                root = _join(path, group, split, job, totals, index, len(groups[split]))
                shards.append({"file": path.name, **totals, "root": f"{root:016x}"})
                bar.update(totals["tokens"])
            if shards:
                totals = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "text_bytes")}
                splits[split] = {**totals, "token_dtype": job.encoding.dtype.name, "shards": shards}
    return splits


def _grouped(journal: Journal, split: str, shard_tokens: int) -> Iterator[list[int]]:
    group: list[int] = []
    size = 0
    for number in sorted(journal.units):
        if split in journal.units[number]:
            group.append(number)
            size += journal.units[number][split]["tokens"]
            if size >= shard_tokens:
                yield group
                group, size = [], 0
    if group:
        yield group


def _join(path: Path, group: list[int], split: str, job: Job, totals: dict[str, int], index: int, n_shards: int) -> int:
    """Write one shard, or find it written, and return its root."""
    if path.is_file():
        finished = ShardFile(path, verify="full").header
        if finished.encoding == job.encoding and finished.n_tokens == totals["tokens"]:
            return finished.root
    parts = [ShardFile(_part(job.out, number, split), verify="full") for number in group]
    begins = np.cumsum([0] + [part.header.n_tokens for part in parts]).tolist()
    header = write_shard(
        path,
        job.encoding,
        (part.tokens(0, part.header.n_tokens) for part in parts),
        np.concatenate([part.doc_ends + begin for part, begin in zip(parts, begins, strict=False)]),
        b"".join(part.doc_hashes.tobytes() for part in parts),
        {"split": split, "text_bytes": totals["text_bytes"]},
        index,
        n_shards,
    )
    return header.root
