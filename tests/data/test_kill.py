"""kill -9 anywhere: what goes on afterwards ends with the bytes of a preparation that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from text_corpus import corpus_texts, write_jsonl

from grist_data.prepare import prepare
from grist_data.prepare_config import PrepareConfig

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
KILLS = 20
# A process can be seen from outside only by what it does to files.
OPERATIONS = ("fsync", "replace", "unlink", "mkdir", "rmdir", "truncate")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def in_a_child(action: Callable[[], object]) -> int:
    """The status of a process that does it, as `os.waitpid` gives it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def killed_at(number: int, before: bool, config: PrepareConfig) -> Callable[[], object]:
    """Prepare, and die just before or after an operation on files, counted from 0."""

    def action() -> None:
        count = [0]
        for name in OPERATIONS:
            setattr(os, name, _counting(getattr(os, name), count, number, before))
        prepare(config)

    return action


def _counting(real: Callable, count: list[int], number: int, before: bool) -> Callable:
    def operation(*arguments, **options):
        mine = count[0]
        count[0] += 1
        if mine == number and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if mine == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return operation


def _settings(folder: Path) -> dict:
    texts = corpus_texts(40)
    file = write_jsonl(folder / "text.jsonl", [*texts, *texts[:7], "", " "])
    return {
        "source": "files",
        "paths": (str(file),),
        "vocab_size": 300,
        "val_fraction": 0.2,
        "unit_bytes": 3000,
        "shard_tokens": 4000,
        "deduplicate": "exact",
        "engine": "tokenizers",
        "workers": 1,
    }


def test_killed_at_twenty_random_points(tmp_path):
    """In an interpreter of its own without threads, which do not survive a fork: the locks that they hold would."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{KILLS} kills\n"


def kill_and_go_on(folder: Path) -> None:
    settings = _settings(folder)
    expected = contents(prepare(PrepareConfig(out=str(folder / "undisturbed"), **settings)))
    operations = _operations_of(PrepareConfig(out=str(folder / "counted"), **settings), folder)
    draw = random.Random(20)
    points = [(draw.randrange(operations), draw.random() < 0.5) for _ in range(KILLS)]
    for k, (number, before) in enumerate(points):
        config = PrepareConfig(out=str(folder / str(k)), **settings)
        assert os.WTERMSIG(in_a_child(killed_at(number, before, config))) == signal.SIGKILL
        in_a_child(killed_at(draw.randrange(operations), before, config))  # where it gets so far
        assert contents(prepare(config)) == expected, f"killed {'before' if before else 'after'} operation {number}"
    print(f"{len(points)} kills")


def _operations_of(config: PrepareConfig, folder: Path) -> int:
    """How many there are in an undisturbed preparation."""

    def action() -> None:
        count = [0]
        for name in OPERATIONS:
            setattr(os, name, _counting(getattr(os, name), count, -1, False))
        prepare(config)
        (folder / "count").write_text(str(count[0]))

    assert in_a_child(action) == 0
    return int((folder / "count").read_text())


if __name__ == "__main__":
    sys.modules["gigatoken"] = None  # type: ignore[assignment]  # trains with threads, which a fork does not have
    kill_and_go_on(Path(sys.argv[1]))
