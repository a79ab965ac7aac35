"""Shards of llm.c and modded-nanogpt: a header of 256 int32 (magic, version, number of ids), then the ids.

karpathy/llm.c dev/data/data_common.py has two kinds. Both put the end-of-text id before every document, and a document that
does not fit a shard goes on in the next.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from grist_data.foreign.token_file import FlatFile

HEADER_BYTES = 256 * 4
# magic -> version, type of the ids
KINDS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}


def has_header(path: Path) -> bool:
    with open(path, "rb") as file:
        return int.from_bytes(file.read(4), "little") in KINDS


def read(path: Path) -> FlatFile:
    """Raises ValueError for another magic or version, and where the file is not as long as its header says."""
    if not path.is_file():
        raise FileNotFoundError(f"no token file at {path}")
    with open(path, "rb") as file:
        page = file.read(HEADER_BYTES)
    if len(page) < HEADER_BYTES:
        raise ValueError(f"{path} is truncated: {len(page):,} bytes, shorter than its {HEADER_BYTES:,}-byte header")
    magic, version, count = np.frombuffer(page, "<i4", 3).tolist()
    if magic not in KINDS:
        raise ValueError(
            f"{path} is no shard of llm.c: it begins with {magic}, expected {' or '.join(map(str, KINDS))}; without a header it"
            " may be nanoGPT's"
        )
    expected, dtype = KINDS[magic]
    if version != expected:
        raise ValueError(f"{path} has version {version} at byte 4, expected {expected} for magic {magic}")
    return FlatFile(path, dtype, HEADER_BYTES, count)
