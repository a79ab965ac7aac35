"""`python -m grist_data.verify`: any flipped byte of any file is found and named."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from grist_data.shards import ShardFile
from grist_data.verify import main, problems_of

DATA = Path(__file__).parents[2] / "data"


def test_a_sound_dataset_has_no_problems(dataset, capsys):
    assert problems_of(dataset) == []
    assert main([str(dataset)]) == 0
    assert "every checksum matches" in capsys.readouterr().out


def test_every_flipped_byte_is_found(own_dataset):
    """A byte of every region of a shard, padding included, and bytes at random."""
    path = sorted(own_dataset.glob("train-*.tok"))[0]
    sound = path.read_bytes()
    sections = ShardFile(path).header.sections
    places = [offset for offset, size in sections.values() if size] + [o + s for o, s in sections.values()]
    draw = random.Random(0)
    places += [draw.randrange(len(sound)) for _ in range(60)]
    for place in places:
        if place == len(sound):
            continue
        damaged = bytearray(sound)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        problems = problems_of(own_dataset)
        assert problems, f"byte {place} was changed and nothing was noticed"
        assert path.name in problems[0]
    path.write_bytes(sound)
    assert problems_of(own_dataset) == []


def test_other_files_are_checked(own_dataset):
    for name in ("tokenizer.json", "dataset.json"):
        file = own_dataset / name
        sound = file.read_bytes()
        file.write_bytes(sound.replace(b"0", b"1", 1))
        assert any(name in problem for problem in problems_of(own_dataset))
        file.write_bytes(sound)


def test_command_names_file_and_block_and_fails(own_dataset):
    paths = sorted(own_dataset.glob("*.tok"))
    for path in (paths[0], paths[-1]):
        data = bytearray(path.read_bytes())
        data[5000] ^= 1
        path.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-m", "grist_data.verify", str(own_dataset)],
        env={"PYTHONPATH": str(DATA)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("block 0 of section tokens") == 2
    assert paths[0].name in done.stderr
    assert paths[-1].name in done.stderr


def test_missing_dataset(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "no dataset in" in capsys.readouterr().err
