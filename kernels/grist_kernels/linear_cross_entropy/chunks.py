"""How many rows of logits exist at once. Needs no torch: plans of memory read it too."""

from __future__ import annotations

# A chunk's logits, in bytes. On a CPU they stay in the last-level cache; on a GPU thousands of rows keep the matrix units busy:
# 2 GiB are 5,000 rows of GPT-OSS's vocabulary in bfloat16.
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 2 * 2**30}
TILE = 128  # rows that the matrix units take at a time


def chunks(rows: int, vocabulary: int, itemsize: int, device_type: str) -> list[slice]:
    """Equal stretches of rows, as few as CHUNK_BYTES allows, long ones in whole tiles."""
    most = max(1, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"]) // (vocabulary * itemsize))
    step = max(1, -(-rows // max(1, -(-rows // most))))
    if TILE < step < rows:
        step = -(-step // TILE) * TILE
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
