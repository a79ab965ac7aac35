"""nanoGPT's `train.bin`, `val.bin`: ids as little-endian uint16, nothing else (karpathy/nanoGPT data/openwebtext/prepare.py).

nanoGPT's own scripts put the end-of-text id after every document, or have none (shakespeare_char).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from grist_data.atomic import atomic_file
from grist_data.foreign import llmc
from grist_data.foreign.token_file import PIECE_TOKENS, FlatFile
from grist_data.shards import Shards

DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("uint16", "uint32", "int32", "int64")}
_LOOKED_AT = 4096


def read(path: Path, dtype: str = "uint16") -> FlatFile:
    """Raises ValueError for a file that is cut inside an id, that has llm.c's header, or whose ids are clearly wider."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, but got {dtype!r}")
    file = FlatFile(path, DTYPES[dtype])
    if llmc.has_header(path):
        raise ValueError(f"{path} begins with the header of an llm.c shard, not with ids: import it as llmc")
    first = file.tokens[: _LOOKED_AT // 2 * 2]
    if dtype == "uint16" and len(first) >= 64 and not first[1::2].any() and first[::2].any():
        raise ValueError(f"{path} holds wider ids: every second 16-bit number is zero; give dtype uint32 (or int64)")
    return file


def write(path: Path, shards: Shards, dtype: str = "uint16") -> None:
    """Write a split as one .bin file.

    Raises ValueError when the vocabulary does not fit the type: nanoGPT itself reads uint16 only.
    """
    kind = DTYPES[dtype]
    if shards.vocab_size - 1 > np.iinfo(kind).max:
        raise ValueError(
            f"a vocabulary of {shards.vocab_size:,} ids does not fit {dtype}, the only type that nanoGPT reads; with dtype"
            " uint32 it is written, and np.uint16 in nanoGPT's train.py has to become np.uint32"
        )
    with (
        atomic_file(path) as file,
        tqdm(total=shards.n_tokens, desc=path.name, unit=" tokens", unit_scale=True, disable=None) as bar,
    ):
        for start in range(0, shards.n_tokens, PIECE_TOKENS):
            ids = shards.read(start, min(PIECE_TOKENS, shards.n_tokens - start))
            file.write(ids.astype(kind).tobytes())
            bar.update(len(ids))
