"""The manifest of a checkpoint: ranks share the work, and together leave nothing out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grist_train.checkpoint_manifest import MANIFEST_FILE, entries_of, manifest_of, problems

FILES = {
    "__0_0.distcp": 5000,
    "__1_0.distcp": 4000,
    "__2_0.distcp": 3000,
    ".metadata": 70,
    "state.json": 20,
    "empty": 0,
}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    for seed, (name, n_bytes) in enumerate(FILES.items()):
        (tmp_path / name).write_bytes(bytes((i * 7 + seed) % 256 for i in range(n_bytes)))
    return tmp_path


def write(directory: Path, size: int) -> list[set[str]]:
    """Write the manifest as `size` ranks do; returns the files that each of them read."""
    shares = [entries_of(directory, rank, size) for rank in range(size)]
    entries = {name: entry for share in shares for name, entry in share.items()}
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest_of(entries)))
    return [set(share) for share in shares]


def test_a_rank_reads_what_it_wrote_and_the_first_the_rest(checkpoint):
    assert write(checkpoint, 3) == [
        {"__0_0.distcp", ".metadata", "state.json", "empty"},
        {"__1_0.distcp"},
        {"__2_0.distcp"},
    ]


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("name", FILES)
def test_any_number_of_ranks_finds_any_change_once(checkpoint, size, name):
    write(checkpoint, 3)
    assert not [each for rank in range(size) for each in problems(checkpoint, "full", rank, size)]
    content = bytearray((checkpoint / name).read_bytes())
    content[-1:] = b"x" if not content else bytes([content[-1] ^ 128])
    (checkpoint / name).write_bytes(content)
    (found,) = [each for rank in range(size) for each in problems(checkpoint, "full", rank, size)]
    assert found.startswith(f"{name}: ")


def test_a_manifest_that_was_altered_accuses_only_itself(checkpoint):
    write(checkpoint, 1)
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    manifest["files"]["state.json"]["bytes"] += 1
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert problems(checkpoint, "full") == [f"{MANIFEST_FILE}: was altered after it was written"]
