"""`manifest.json` of a checkpoint: size and xxh3_64 of every other file in it, so that one that was torn or altered is
noticed before it is used.

The manifest carries a hash of itself: damage to it is not mistaken for damage to what it lists.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import xxhash

MANIFEST_FILE = "manifest.json"
_PIECE_BYTES = 2**22

Entries = dict[str, dict[str, Any]]


def entries_of(directory: Path, rank: int, size: int) -> Entries:
    """`{name: {bytes, xxh3_64}}` of the files that `rank` of `size` has to read: those that it wrote, which its machine still
    has in memory (torch.distributed.checkpoint calls them __RANK_N.distcp), and on rank 0 all others."""
    entries: Entries = {}
    for path in sorted(directory.iterdir()):
        match = re.match(r"__(\d+)_", path.name)
        writer = int(match.group(1)) if match else 0
        if path.name != MANIFEST_FILE and (writer if writer < size else 0) == rank:
            entries[path.name] = {"bytes": path.stat().st_size, "xxh3_64": _hash(path)}
    return entries


def manifest_of(entries: Entries) -> dict[str, Any]:
    """What `manifest.json` holds."""
    return {"files": entries, "xxh3_64": _own_hash(entries)}


def problems(directory: Path, verify: Literal["full", "size"], rank: int = 0, size: int = 1) -> list[str]:
    """What is not as the manifest says, `FILE: what`, in this rank's share of the files; [] is as it should be.

    A checkpoint without a manifest is of an earlier version: there is nothing to compare it with.
    """
    path = directory / MANIFEST_FILE
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_bytes())
        entries: Entries = stored["files"]
        intact = stored["xxh3_64"] == _own_hash(entries)
    except (ValueError, KeyError, TypeError, OSError) as error:
        return [f"{MANIFEST_FILE}: cannot be read ({type(error).__name__}: {error})"]
    if not intact:
        return [f"{MANIFEST_FILE}: was altered after it was written"]
    by_size = sorted(entries.items(), key=lambda item: (-item[1]["bytes"], item[0]))
    found = (_problem(directory / name, entry, verify) for name, entry in by_size[rank::size])
    return [each for each in found if each is not None]


def _problem(path: Path, entry: dict[str, Any], verify: Literal["full", "size"]) -> str | None:
    try:
        n_bytes = path.stat().st_size
        if n_bytes != entry["bytes"]:
            return f"{path.name}: has {n_bytes} bytes, but {entry['bytes']} were written"
        if verify == "full" and _hash(path) != entry["xxh3_64"]:
            return f"{path.name}: its bytes are not those that were written (xxh3_64 {entry['xxh3_64']})"
    except FileNotFoundError:
        return f"{path.name}: is missing"
    except OSError as error:
        return f"{path.name}: cannot be read ({error})"
    return None


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _own_hash(entries: Entries) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(entries, sort_keys=True).encode())
