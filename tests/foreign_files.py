"""Token files of other programs, written byte by byte as their own programs do, and read as datasets."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import numpy as np

from grist_data import Shards
from grist_data.import_tokens import ImportConfig, import_tokens
from grist_data.verify import problems_of


def split_documents(shards: Shards) -> list[np.ndarray]:
    ends = [0, *shards.document_ends(0, shards.n_tokens).tolist(), shards.n_tokens]
    return [shards.read(a, b - a) for a, b in itertools.pairwise(ends)]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return len(found) == len(expected) and all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def write_nanogpt(path: Path, documents: list[np.ndarray], dtype: str = "<u2") -> Path:
    path.write_bytes(b"".join(ids.astype(dtype).tobytes() for ids in documents))
    return path


def write_llmc(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> Path:
    path.write_bytes(struct.pack("<3i", magic, version, len(ids)).ljust(1024, b"\0") + ids.astype(dtype).tobytes())
    return path


def write_megatron(prefix: Path, documents: list[list[np.ndarray]], dtype: str = "<u2", code: int = 8) -> Path:
    """documents: of each, its sequences."""
    sequences = [ids for document in documents for ids in document]
    Path(f"{prefix}.bin").write_bytes(b"".join(ids.astype(dtype).tobytes() for ids in sequences))
    lengths = [len(ids) for ids in sequences]
    pointers = [sum(lengths[:k]) * np.dtype(dtype).itemsize for k in range(len(lengths))]
    starts = [sum(len(document) for document in documents[:k]) for k in range(len(documents) + 1)]
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<Q", len(lengths))
        + struct.pack("<Q", len(starts))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(starts)}q", *starts)
    )
    return prefix


def imported(tmp_path: Path, dataset: Path, format: str, *files: Path, **options) -> Shards:
    config = ImportConfig(
        format, tuple(map(str, files)), tokenizer=str(dataset / "tokenizer.json"), out=str(tmp_path / "out"), **options
    )
    directory = import_tokens(config)
    assert problems_of(directory) == []
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]
    return Shards.open(directory, verify="full")
