"""kill -9 anywhere: what goes on afterwards ends with the bytes of a preparation that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
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


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    texts = corpus_texts(40)
    file = write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", [*texts, *texts[:7], "", " "])
    return {
        "source": "files",
        "paths": (str(file),),
        "vocab_size": 300,
        "val_fraction": 0.2,
        "unit_bytes": 3000,
        "shard_tokens": 4000,
        "deduplicate": "exact",
        "engine": "tokenizers",  # the others' threads do not survive a fork
        "workers": 1,
    }


def test_killed_at_twenty_random_points(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    # A forked process trains with tokenizers, and dataset.json says who trained: all of them shall here.
    monkeypatch.setattr("grist_data.tokenizer_training.gigatoken_is_installed", lambda: False)
    expected = contents(prepare(PrepareConfig(out=str(tmp_path / "undisturbed"), **settings)))
    operations = _operations_of(PrepareConfig(out=str(tmp_path / "counted"), **settings), tmp_path)
    draw = random.Random(20)
    points = [(draw.randrange(operations), draw.random() < 0.5) for _ in range(KILLS)]
    for k, (number, before) in enumerate(points):
        config = PrepareConfig(out=str(tmp_path / str(k)), **settings)
        assert os.WTERMSIG(in_a_child(killed_at(number, before, config))) == signal.SIGKILL
        in_a_child(killed_at(draw.randrange(operations), before, config))  # where it gets so far
        assert contents(prepare(config)) == expected, f"killed {'before' if before else 'after'} operation {number}"


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
