"""One dataset from any number of processes and tasks, and what is said when one of them fails."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from text_corpus import corpus_texts, write_jsonl

from grist_data import Document, Shards, encode, lock, spread
from grist_data.manifest import read_manifest
from grist_data.preparation import Preparation
from grist_data.prepare import prepare
from grist_data.prepare_config import PrepareConfig
from grist_data.sources import SOURCES
from grist_data.verify import problems_of
from grist_data.workers import Workers

DATA = Path(__file__).parents[2] / "data"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("texts")
    texts = corpus_texts(90)
    write_jsonl(folder / "a.jsonl", texts[:50])
    write_jsonl(folder / "b.jsonl", [*texts[50:], *texts[:20], "  "])
    for k in range(7):
        (folder / f"c{k}.txt").write_text(f"{texts[k]} again")
    return {
        "source": "files",
        "paths": (str(folder),),
        "vocab_size": 300,
        "val_fraction": 0.2,
        "unit_bytes": 3000,
        "shard_tokens": 6000,
        "deduplicate": "exact",
        "licence": "CC0-1.0",
    }


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory) -> Path:
    """The dataset that one process makes."""
    return prepare(PrepareConfig(out=str(tmp_path_factory.mktemp("one") / "d"), workers=1, **settings))


def test_the_dataset_says_what_was_left_out(one):
    source = read_manifest(one)["source"]
    assert source["licence"] == "CC0-1.0"
    assert source["documents"] == 97
    assert source["dropped"]["duplicate"]["documents"] == 20
    assert source["dropped"]["empty"] == {"documents": 1, "text_bytes": 2}
    assert source["replaced"] == {"documents": 0, "characters": 0}
    assert sum(engine["documents"] for engine in read_manifest(one)["encoding"]) == 97
    assert len(list(one.glob("train-*.tok"))) > 2


@pytest.mark.parametrize("workers", [2, 5])
def test_processes_make_the_same_bytes(settings, one, tmp_path, workers):
    made = prepare(PrepareConfig(out=str(tmp_path / "d"), workers=workers, **settings))
    assert contents(made) == contents(one)


@pytest.mark.parametrize("world", [1, 2, 5, 40])
def test_tasks_make_the_same_bytes(settings, one, tmp_path, world):
    config = PrepareConfig(out=str(tmp_path / "d"), workers=1, **settings)
    for rank in reversed(range(world)):
        spread.survey(config, rank, world)
    spread.plan(config)
    for rank in range(1, world + 1):
        spread.encode(config, rank % world, world)
    spread.finish(config)
    assert contents(tmp_path / "d") == contents(one)
    for step in (spread.survey, spread.plan, spread.encode, spread.finish):
        step(config)  # finds it finished
    with pytest.raises(ValueError, match="is finished: there is no part of it"):
        spread.finish(config, str(tmp_path / "early"))
    assert contents(tmp_path / "d") == contents(one)


class Killed(BaseException):
    pass


def test_a_killed_task_is_run_again_alone(settings, one, tmp_path, monkeypatch):
    config = PrepareConfig(out=str(tmp_path / "d"), workers=1, **settings)
    with pytest.raises(ValueError, match=r"nothing is begun in .*: survey first"):
        spread.plan(config)
    for rank in (0, 2):
        spread.survey(config, rank, 3)
    with pytest.raises(ValueError, match=r"has no plan yet"):
        spread.encode(config, 0, 3)
    with pytest.raises(ValueError, match=r"of \d+ spans are not surveyed yet \(the first is number 1\)"):
        spread.plan(config)
    spread.survey(config, 1, 3)
    spread.plan(config)
    real, left = encode.encode_unit, [2]

    def stopping(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode_unit", stopping)
        with pytest.raises(Killed):
            spread.encode(config, 1, 3)
    (tmp_path / "d" / "parts" / "000099.rec.part").write_bytes(b"half")
    for rank in (0, 2):
        spread.encode(config, rank, 3)
    with pytest.raises(ValueError, match=r"units are not encoded \(the first is number \d+\): run those tasks again"):
        spread.finish(config)
    done: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode_unit", lambda *arguments: done.append(arguments[0]) or real(*arguments))
        spread.encode(config, 1, 3)
    n = len(Preparation(config).plan.units)
    assert done == list(range(n // 3 + 2, n * 2 // 3))
    spread.finish(config)
    assert contents(tmp_path / "d") == contents(one)


def test_a_part_of_the_work_is_a_dataset(settings, one, tmp_path):
    config = PrepareConfig(out=str(tmp_path / "d"), workers=1, **settings)
    spread.survey(config)
    spread.plan(config)
    with pytest.raises(ValueError, match="the first unit is not encoded yet"):
        spread.finish(config, str(tmp_path / "early"))
    spread.encode(config, 0, 3)
    spread.encode(config, 2, 3)
    spread.finish(config, str(tmp_path / "early"))
    assert problems_of(tmp_path / "early") == []
    early, whole = Shards.open(tmp_path / "early"), Shards.open(one)
    assert early.read(0, early.n_tokens).tolist() == whole.read(0, early.n_tokens).tolist()
    n = len(Preparation(config).plan.units)
    assert read_manifest(tmp_path / "early")["source"]["units"] == {"in_here": n // 3, "of": n}
    spread.encode(config, 1, 3)
    spread.finish(config)
    assert contents(tmp_path / "d") == contents(one)


def test_the_command_line_of_tasks(settings, one, tmp_path, capsys):
    file = tmp_path / "prepare.yaml"
    lines = [f"{key}: {list(value) if isinstance(value, tuple) else value}\n" for key, value in settings.items()]
    file.write_text("".join(lines))
    common = ["--config", str(file), "--out", str(tmp_path / "d"), "--workers", "1"]
    assert spread.main(["plan", *common]) == 2
    assert capsys.readouterr().err.startswith("error: nothing is begun")
    assert spread.main(["survey", "--rank", "2", "--world", "2", *common]) == 2
    assert "rank must be at least 0 and below world (2), but is 2" in capsys.readouterr().err
    assert spread.main(["encode", "--partial", "x", *common]) == 2
    assert "--partial belongs to the step finish" in capsys.readouterr().err
    for step in (
        ["survey", "--world", "2"],
        ["survey", "--rank", "1", "--world", "2"],
        ["plan"],
        ["encode"],
        ["finish"],
    ):
        assert spread.main([*step, *common]) == 0
    assert contents(tmp_path / "d") == contents(one)


def kill_at_the_first_answer(workers: Workers, preparation: Preparation) -> None:
    for _ in workers.run(preparation.survey_tasks(), 2):
        os.kill(workers._processes[0]._popen.pid, signal.SIGKILL)


def test_a_killed_worker_is_reported(settings, one, tmp_path):
    config = PrepareConfig(out=str(tmp_path / "d"), workers=2, **settings)
    (tmp_path / "d").mkdir()
    preparation = Preparation(config)
    message = r"a worker was killed by signal 9 .*fewer workers.* while reading span \d+, "
    with pytest.raises(ChildProcessError, match=message), Workers(preparation) as workers:
        kill_at_the_first_answer(workers, preparation)
    assert all(process._popen.poll() is not None for process in workers._processes)
    prepare(config)
    assert contents(tmp_path / "d") == contents(one)


def test_the_error_of_a_worker_names_file_and_span(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", corpus_texts(60))
    with open(file, "ab") as text:
        text.write(b'{"text": \n')
    config = PrepareConfig(source="files", paths=(str(file),), out=str(tmp_path / "d"), unit_bytes=2000, workers=2)
    with pytest.raises(
        ValueError, match=r"a\.jsonl:\d+ after byte \d+: not valid JSON: .* \(while reading span \d+, .*a\.jsonl"
    ):
        prepare(config)
    assert not list((tmp_path / "d").rglob("*.part"))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no such file"):
        prepare(config)


def test_an_engine_that_cannot_is_said_by_its_worker(settings, tmp_path):
    pytest.importorskip("tiktoken")
    config = PrepareConfig(
        **{
            **settings,
            "out": str(tmp_path / "d"),
            "workers": 2,
            "engine": "tiktoken",
            "tokenizer": "wordpiece",
            "vocab_size": 600,
        }
    )
    with pytest.raises(
        ValueError, match=r"cannot encode for this tokenizer: .* \(while encoding units \d+ to \d+, of span \d+, "
    ):
        prepare(config)


def long_preparation(tmp_path: Path) -> tuple[Path, subprocess.Popen]:
    """A preparation on two processes that is busy encoding."""
    file = write_jsonl(tmp_path / "text.jsonl", corpus_texts(3000))
    out = tmp_path / "d"
    command = [sys.executable, "-m", "grist_data.prepare", "--source", "files", "--paths", str(file), "--out", str(out)]
    command += ["--vocab_size", "300", "--unit_bytes", "3000", "--workers", "2"]
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(DATA)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below what runs in the background
    )
    while process.poll() is None and not list(out.glob("parts/*.rec")):
        time.sleep(0.005)
    return out, process


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_end_all_processes(tmp_path, number):
    out, process = long_preparation(tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), said
    with open(out / ".lock", "ab") as file:  # which the workers hold, too, as long as they live
        for _ in range(200):
            if lock._try_lock(file):
                break
            time.sleep(0.02)
        else:
            pytest.fail("a worker outlives the process that began it")
    if number != signal.SIGKILL:
        assert "interrupted: run the same command again" in said
        assert "Traceback" not in said
        assert not list(out.rglob("*.part"))
    assert not (out / "dataset.json").exists()


def test_a_script_without_a_main_guard(settings, one, tmp_path):
    script = tmp_path / "script.py"
    config = {**settings, "out": str(tmp_path / "d"), "workers": 2}
    script.write_text(f"from grist_data import PrepareConfig, prepare\nprint(prepare(PrepareConfig(**{config!r})))\n")
    done = subprocess.run(
        [sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(DATA)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert contents(tmp_path / "d") == contents(one)


def test_a_source_of_this_process_stays_in_it(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "mine", lambda: iter([Document(text, "") for text in corpus_texts(9)]))
    made = prepare(PrepareConfig(source="mine", out=str(tmp_path / "d"), vocab_size=300, workers=3))
    assert sum(Shards.open(made, split).n_docs for split in ("train", "val")) == 9


def test_one_span_is_shared_among_processes(tmp_path):
    """A source that cannot be divided: every process reads it, and encodes its own units."""
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(write_jsonl(tmp_path / "a.jsonl", corpus_texts(60)).read_bytes()))
    config = {"source": "files", "paths": (str(packed),), "vocab_size": 300, "unit_bytes": 2000}
    many = PrepareConfig(out=str(tmp_path / "many"), workers=3, **config)
    alone = PrepareConfig(out=str(tmp_path / "alone"), workers=1, **config)
    assert contents(prepare(many)) == contents(prepare(alone))


def test_tasks_of_a_share(tmp_path):
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(write_jsonl(tmp_path / "a.jsonl", corpus_texts(60)).read_bytes()))
    config = PrepareConfig(
        source="files", paths=(str(packed),), vocab_size=300, unit_bytes=2000, out=str(tmp_path / "d"), workers=1
    )
    spread.survey(config)
    spread.plan(config)
    preparation = Preparation(config)
    n = len(preparation.plan.units)
    assert len(preparation.spans) == 1
    for shares in (1, 3, n, 10 * n):
        tasks = preparation.encode_tasks(range(n), shares)
        assert len(tasks) == min(shares, n)
        assert [unit for task in tasks for unit in task["units"]] == list(range(n))
    assert preparation.encode_tasks([]) == []


def test_the_slurm_script(settings, one, tmp_path):
    """With an sbatch that does every task at once."""
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(FAKE_SBATCH)
    fake.chmod(0o755)
    lines = [f"{key}: {list(value) if isinstance(value, tuple) else value}\n" for key, value in settings.items()]
    (tmp_path / "prepare.yaml").write_text("".join([*lines, f"out: {tmp_path / 'd'}\n", "workers: 1\n"]))
    environment = os.environ | {
        "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(DATA),
        "CALLS": str(tmp_path / "calls"),
    }
    command = ["bash", str(DATA / "slurm_prepare.sh"), str(tmp_path / "prepare.yaml"), "2", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "survey 1, plan 2, encode 3, finish 4\n", done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ["--array 0-1 " in calls[0], "--array" in calls[1], "--array 0-2 " in calls[2]] == [True, False, True]
    assert ["--dependency" in call for call in calls] == [False, True, True, True]
    assert "--dependency afterok:3 " in calls[3]
    assert contents(tmp_path / "d") == contents(one)


FAKE_SBATCH = r"""#!/bin/bash
set -e
echo "$@" >> "$CALLS"
first=0 last=0
while [ "${1:0:2}" = -- ]; do
    case "$1" in
        --array) first=${2%-*} last=${2#*-}; shift 2 ;;
        --parsable | --kill-on-invalid-dep=yes) shift ;;
        *) shift 2 ;;
    esac
done
for task in $(seq "$first" "$last"); do
    SLURM_ARRAY_TASK_ID=$task bash "$@" >&2
done
wc -l < "$CALLS"
"""
