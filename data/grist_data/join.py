"""Parts to shards: each of whole units and at least `shard_tokens` tokens, but for the last of a split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grist_data.encode import Job, part_file, read_part_facts
from grist_data.finish import totals
from grist_data.manifest import TRAINED
from grist_data.plan import SPLITS
from grist_data.record_file import read_record
from grist_data.shard_writer import write_shard
from grist_data.shards import ShardFile


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: number `index` of `count` of its split, of these units.

    tokens, documents, text_bytes: what it will hold. trained_tokens: of these, where there is a loss mask.
    """

    split: str
    index: int
    count: int
    units: list[int]
    tokens: int
    documents: int
    text_bytes: int
    trained_tokens: int | None = None

    @property
    def file(self) -> str:
        return f"{self.split}-{self.index:05d}-of-{self.count:05d}.tok"


def plan_shards(job: Job, units: Sequence[int], shard_tokens: int) -> list[ShardPlan]:
    """Raises FileNotFoundError for a unit that is not encoded."""
    of_unit = {number: read_part_facts(number, job)["splits"] for number in units}
    shards = []
    for split in SPLITS:
        groups = list(_grouped({number: of[split] for number, of in of_unit.items() if split in of}, shard_tokens))
        for index, group in enumerate(groups):
            shards.append(
                ShardPlan(split, index, len(groups), group, **totals([of_unit[number][split] for number in group]))
            )
    return shards


def _grouped(counts: dict[int, dict[str, int]], shard_tokens: int) -> Iterator[list[int]]:
    group: list[int] = []
    size = 0
    for number, of_unit in counts.items():
        group.append(number)
        size += of_unit["tokens"]
        if size >= shard_tokens:
            yield group
            group, size = [], 0
    if group:
        yield group


def write_planned(shard: ShardPlan, job: Job, directory: Path) -> int:
    """Write one shard, or find it written, and return its root. Raises ValueError for a damaged part."""
    path = directory / shard.file
    if path.is_file():
        finished = ShardFile(path, verify="full").header
        if (
            finished.encoding == job.encoding
            and finished.n_tokens == shard.tokens
            and finished.has_loss_mask == (job.chat is not None)
        ):
            return finished.root
    lengths, hashes = zip(*(_documents(number, shard.split, job) for number in shard.units), strict=True)
    header = write_shard(
        path,
        job.encoding,
        (_tokens(number, shard.split, job) for number in shard.units),
        np.cumsum(np.concatenate(lengths)),
        b"".join(hashes),
        {"split": shard.split, "text_bytes": shard.text_bytes},
        shard.index,
        shard.count,
        None if job.chat is None else (_trained(number, shard.split, job) for number in shard.units),
    )
    return header.root


# A part is mapped by each of these anew: a shard of validation may have a little of every part there is.


def _documents(number: int, split: str, job: Job) -> tuple[np.ndarray, bytes]:
    """Length in tokens, and 16 bytes of hash, of each document of a part that is in the split."""
    part = read_record(part_file(job.out, number))[1]
    rows = part["held_out"] == (split == "val")
    return part["lengths"][rows], part["hashes"][rows].tobytes()


def _tokens(number: int, split: str, job: Job) -> np.ndarray:
    """Tokens of these documents: a view of the file where all of the part are."""
    part = read_record(part_file(job.out, number))[1]
    rows = part["held_out"] == (split == "val")
    return part["tokens"] if rows.all() else part["tokens"][np.repeat(rows, part["lengths"])]


def _trained(number: int, split: str, job: Job) -> np.ndarray:
    """Which of these tokens are trained: bool."""
    part = read_record(part_file(job.out, number))[1]
    return part["trained"][np.repeat(part["held_out"] == (split == "val"), part["lengths"])]


def splits_of(shards: Sequence[ShardPlan], roots: Sequence[int], job: Job) -> dict[str, Any]:
    """`splits` of dataset.json."""
    splits = {}
    for split in SPLITS:
        of_split = [
            {
                "file": shard.file,
                "tokens": shard.tokens,
                "documents": shard.documents,
                "text_bytes": shard.text_bytes,
                **({} if shard.trained_tokens is None else {TRAINED: shard.trained_tokens}),
                "root": f"{root:016x}",
            }
            for shard, root in zip(shards, roots, strict=True)
            if shard.split == split
        ]
        if of_split:
            splits[split] = {**totals(of_split), "token_dtype": job.encoding.dtype.name, "shards": of_split}
    return splits
