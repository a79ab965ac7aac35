"""Text to dataset: the same id every time, also after being killed; and clear errors for what cannot be prepared."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from text_corpus import corpus_texts, write_jsonl

import grist_data
from grist_data import Document, Shards, Tokenizer, work
from grist_data import encode as encode_module
from grist_data.manifest import read_manifest
from grist_data.prepare import PrepareConfig, prepare
from grist_data.sources import SOURCES
from grist_data.tokenizer_training import train_bpe
from grist_data.verify import problems_of

# The name is that of the function in the package, too.
prepare_module = importlib.import_module("grist_data.prepare")
DATA = Path(__file__).parents[2] / "data"


def dataset_id(directory: Path) -> str:
    return json.loads((directory / "dataset.json").read_text(encoding="utf-8"))["dataset_id"]


def files_of(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_dataset_is_complete_and_sound(dataset):
    assert problems_of(dataset) == []
    shards = sorted(path.name for path in dataset.glob("*.tok"))
    n = len([name for name in shards if name.startswith("train")])
    assert n > 2
    assert shards[0] == f"train-00000-of-{n:05d}.tok"
    others = {"dataset.json", "tokenizer.json", "tokenizer_config.json", "journal.jsonl", ".lock"}
    assert files_of(dataset) == {*shards, *others}
    for split in ("train", "val"):
        opened = Shards.open(dataset, split)
        assert opened.n_docs > 1
        assert opened.tokenizer_sha256 == Tokenizer.load(dataset).sha256
        assert opened.eot_id == Tokenizer.load(dataset).eot_id
        assert opened.dtype == np.uint16


def test_the_same_text_gives_the_same_bytes(dataset, config, tmp_path):
    again = prepare(config(tmp_path / "again", shard_tokens=3000))
    for file in dataset.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_units_do_not_change_a_dataset_of_one_shard(config, tmp_path):
    a = prepare(config(tmp_path / "a", unit_bytes=2000))
    b = prepare(config(tmp_path / "b", unit_bytes=10**9))
    assert Shards.open(a).read(0, 500).tolist() == Shards.open(b).read(0, 500).tolist()
    assert dataset_id(a) == dataset_id(b)


def test_a_finished_dataset_is_left_alone(config, tmp_path, monkeypatch):
    made = config(tmp_path / "d")
    prepare(made)
    before = {path: path.stat().st_mtime_ns for path in made_files(tmp_path / "d")}
    monkeypatch.setitem(SOURCES, "files", lambda paths: pytest.fail("the source was read again"))
    begin = time.monotonic()
    assert prepare(made) == tmp_path / "d"
    assert time.monotonic() - begin < 0.3
    assert {path: path.stat().st_mtime_ns for path in made_files(tmp_path / "d")} == before


def made_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name != ".lock")


def test_other_settings_are_refused_or_replace_it(config, tmp_path):
    prepare(config(tmp_path / "d"))
    with pytest.raises(
        ValueError, match=r"holds a dataset of other settings \(vocab_size was 320, now 300\): .*overwrite"
    ):
        prepare(config(tmp_path / "d", vocab_size=300))
    assert Shards.open(tmp_path / "d").vocab_size == 320
    prepare(config(tmp_path / "d", vocab_size=300, overwrite=True))
    assert Shards.open(tmp_path / "d").vocab_size == 300
    assert problems_of(tmp_path / "d") == []


def test_a_foreign_directory_is_not_touched(config, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds a tokenizer.json that no preparation wrote"):
            prepare(config(tmp_path, overwrite=overwrite))
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("units", [0, 1, 4])
@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_preparation_goes_on(dataset, config, tmp_path, monkeypatch, units, torn):
    """Stopped after so many units, with or without half a line at the end of the journal."""
    out = tmp_path / "d"
    made = config(out, shard_tokens=3000)
    real = encode_module.encode_unit
    encoded: list[int] = []

    def stopping(number, *rest):
        if len(encoded) == units:
            raise Killed
        encoded.append(number)
        return real(number, *rest)

    monkeypatch.setattr(encode_module, "encode_unit", stopping)
    with pytest.raises(Killed):
        prepare(made)
    with pytest.raises(ValueError, match="is not finished"):
        Shards.open(out)
    if torn:
        with open(out / "journal.jsonl", "ab") as journal:
            journal.write(b'{"event": "tokenizer", "sha2')
    (out / "tokenizer.json.part").write_bytes(b"half")
    resumed: list[int] = []
    monkeypatch.setattr(
        encode_module, "encode_unit", lambda number, *rest: resumed.append(number) or real(number, *rest)
    )
    prepare(made)
    assert resumed[0] == units
    assert not set(resumed) & set(encoded)
    assert dataset_id(out) == dataset_id(dataset)
    assert files_of(out) == files_of(dataset)


def test_parts_that_are_missing_or_damaged_are_made_again(dataset, config, tmp_path, monkeypatch):
    out = tmp_path / "d"
    made = config(out, shard_tokens=3000)
    monkeypatch.setattr(work, "plan_shards", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare(made)
    monkeypatch.undo()
    parts = sorted((out / "parts").iterdir())
    parts[0].unlink()
    for part, place in ((parts[-1], 1500), (parts[-4], 10)):
        data = bytearray(part.read_bytes())
        data[place] ^= 1
        part.write_bytes(data)
    prepare(made)
    assert dataset_id(out) == dataset_id(dataset)


def test_shards_that_were_finished_are_kept(dataset, config, tmp_path, monkeypatch):
    out = tmp_path / "d"
    made = config(out, shard_tokens=3000)
    monkeypatch.setattr(work, "write_manifest", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare(made)
    monkeypatch.undo()
    shards = sorted(out.glob("*.tok"))
    shards[1].unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tok")}
    prepare(made)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert dataset_id(out) == dataset_id(dataset)


def test_changed_settings_of_an_unfinished_dataset(config, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "encode_unit", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare(config(tmp_path / "d"))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"holds an unfinished dataset of other settings \(seed was 0, now 1\)"):
        prepare(config(tmp_path / "d", seed=1))
    prepare(config(tmp_path / "d", seed=1, overwrite=True))
    assert problems_of(tmp_path / "d") == []


@pytest.mark.parametrize("change", ["edited", "shorter", "longer"])
def test_a_source_that_changes_midway_is_noticed(config, tmp_path, monkeypatch, change):
    texts = corpus_texts(20)
    file = write_jsonl(tmp_path / "text.jsonl", texts)
    made = config(tmp_path / "d", paths=(str(file),))
    monkeypatch.setattr(encode_module, "encode_unit", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare(made)
    monkeypatch.undo()
    write_jsonl(file, {"edited": [*texts[:-1], "else"], "shorter": texts[:-1], "longer": [*texts, "more"]}[change])
    with pytest.raises(ValueError, match="the source is not what it was when this preparation began"):
        prepare(made)


def test_kill_minus_nine(dataset, config, corpus, tmp_path):
    """Killed once some files are there, several times over, until a run gets to the end."""
    out = tmp_path / "d"
    command = [
        sys.executable,
        "-m",
        "grist_data.prepare",
        "--source",
        "files",
        "--paths",
        str(corpus),
        "--out",
        str(out),
    ]
    command += ["--vocab_size", "320", "--val_fraction", "0.2", "--unit_bytes", "4000", "--shard_tokens", "3000"]
    env = os.environ | {"PYTHONPATH": str(DATA), "TOKENIZERS_PARALLELISM": "false"}
    kills = 0
    for pattern, number in (("survey/*.rec", 1), ("parts/*.rec", 1), ("parts/*.rec", 4)):
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and len(list(out.glob(pattern))) < number:
            time.sleep(0.0005)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills >= 2, "the process was faster than the test: make the corpus larger"
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert dataset_id(out) == dataset_id(dataset)
    assert files_of(out) == files_of(dataset)
    assert problems_of(out) == []


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_no_half_written_file(config, tmp_path, number):
    file = write_jsonl(tmp_path / "text.jsonl", corpus_texts(3000))
    out = tmp_path / "d"
    command = [sys.executable, "-m", "grist_data.prepare", "--source", "files", "--paths", str(file), "--out", str(out)]
    command += ["--vocab_size", "300", "--unit_bytes", "3000"]
    env = os.environ | {"PYTHONPATH": str(DATA), "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below what runs in the background
    )
    while process.poll() is None and not list(out.glob("parts/*.rec")):
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert "interrupted: run the same command again, it goes on from here" in said
    assert "Traceback" not in said
    assert not list(out.rglob("*.part"))
    assert not (out / "dataset.json").exists()


def test_two_processes_prepare_one_dataset(corpus, tmp_path, dataset):
    command = [sys.executable, "-m", "grist_data.prepare", "--source", "files", "--paths", str(corpus)]
    command += ["--out", str(tmp_path / "d"), "--vocab_size", "320", "--val_fraction", "0.2", "--unit_bytes", "4000"]
    command += ["--shard_tokens", "3000"]
    env = os.environ | {"PYTHONPATH": str(DATA)}
    both = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate(timeout=60)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0], said
    assert said.count("documents;") == 1, "one of them should have found it finished"
    assert dataset_id(tmp_path / "d") == dataset_id(dataset)


def test_full_disk_says_so_and_goes_on_afterwards(config, tmp_path, monkeypatch, dataset):
    import errno

    import grist_data.atomic as atomic

    real, left = os.fsync, [6]

    def fsync(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    made = config(tmp_path / "d", shard_tokens=3000)
    with pytest.raises(OSError, match=r"no space left") as error:
        prepare(made)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    prepare(made)
    assert dataset_id(tmp_path / "d") == dataset_id(dataset)


def test_a_text_file_of_its_own_tokenizer(config, tmp_path, dataset):
    """A path as tokenizer, and another file under the same path is another dataset."""
    own = tmp_path / "tokenizer"
    train_bpe(corpus_texts(10), 300).save(own)
    made = config(tmp_path / "d", tokenizer=str(own))
    prepare(made)
    assert Tokenizer.load(tmp_path / "d").sha256 == Tokenizer.load(own).sha256
    train_bpe(corpus_texts(10), 310).save(own)
    with pytest.raises(ValueError, match="tokenizer_file_sha256 was"):
        prepare(made)


def test_a_tokenizer_inside_the_dataset_is_refused(config, tmp_path):
    train_bpe(corpus_texts(10), 300).save(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="lies in the dataset's own directory"):
            prepare(config(tmp_path, tokenizer=str(tmp_path), overwrite=overwrite))
    assert Tokenizer.load(tmp_path).vocab_size == 300


def test_without_end_of_text(config, tmp_path):
    shards = Shards.open(prepare(config(tmp_path / "d", append_eot=False, val_fraction=0.0)))
    assert shards.eot_id == 0
    assert 0 not in shards.read(0, shards.n_tokens)
    with pytest.raises(ValueError, match="has no split 'val'"):
        Shards.open(tmp_path / "d", "val")


def test_a_tokenizer_without_end_of_text_is_refused(config, tmp_path):
    train_bpe(corpus_texts(10), 300, ()).save(tmp_path / "t")
    with pytest.raises(ValueError, match="has no end-of-text token to put after documents"):
        prepare(config(tmp_path / "d", tokenizer=str(tmp_path / "t")))
    assert prepare(config(tmp_path / "e", tokenizer=str(tmp_path / "t"), append_eot=False))


def test_wide_tokens_on_request_and_by_need(config, tmp_path, monkeypatch):
    assert Shards.open(prepare(config(tmp_path / "d", token_dtype="uint32"))).dtype == np.uint32
    definition = json.loads(train_bpe(corpus_texts(10), 300).json_bytes)
    definition["model"]["vocab"]["far away"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    wide = config(tmp_path / "e", tokenizer=str(tmp_path / "tokenizer.json"))
    assert Shards.open(prepare(wide)).dtype == np.uint32
    with pytest.raises(ValueError, match="vocabulary too large for uint16: 70,001 ids"):
        prepare(config(tmp_path / "f", tokenizer=str(tmp_path / "tokenizer.json"), token_dtype="uint16"))


def test_the_tokenizer_sees_training_text_only(config, corpus, tmp_path, monkeypatch):
    import grist_data.tokenizer_training as training

    seen: list[str] = []
    monkeypatch.setitem(
        training.TRAINERS, "bpe", lambda texts, *rest: train_bpe([seen.append(text) or text for text in texts], *rest)
    )
    prepare(config(tmp_path / "d"))
    tokenizer, train = Tokenizer.load(tmp_path / "d"), Shards.open(tmp_path / "d")
    assert "".join(seen).encode() == tokenizer.token_bytes(
        i for i in train.read(0, train.n_tokens) if i != train.eot_id
    )


def test_a_tokenizer_is_trained_on_a_sample(config, tmp_path, monkeypatch):
    import grist_data.tokenizer_training as training

    sizes: list[int] = []
    monkeypatch.setitem(
        training.TRAINERS,
        "bpe",
        lambda texts, *rest: train_bpe([sizes.append(len(t.encode())) or t for t in texts], *rest),
    )
    prepare(config(tmp_path / "d", training_bytes=20_000, val_fraction=0.0))
    assert 8_000 < sum(sizes) < 32_000


def test_a_smaller_vocabulary_than_asked_is_said(config, tmp_path, capsys):
    prepare(config(tmp_path / "d", vocab_size=50_000))
    assert "vocab_size is" in capsys.readouterr().err
    assert Shards.open(tmp_path / "d").vocab_size < 5000


def test_documents_without_a_character_are_left_out(config, tmp_path):
    file = write_jsonl(tmp_path / "text.jsonl", ["", " \n", *corpus_texts(5), "\t"])
    made = prepare(config(tmp_path / "d", paths=(str(file),)))
    assert sum(Shards.open(made, split).n_docs for split in ("train", "val")) == 5


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_empty_corpus(config, tmp_path, texts):
    file = write_jsonl(tmp_path / "text.jsonl", texts)
    with pytest.raises(ValueError, match="the corpus is empty"):
        prepare(config(tmp_path / "d", paths=(str(file),)))


def test_missing_file(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file.*: .*absent\.txt"):
        prepare(config(tmp_path / "d", paths=(str(tmp_path / "absent.txt"),)))
    with pytest.raises(FileNotFoundError, match="tokenizer 'absent' is neither bpe, wordpiece, gpt2"):
        prepare(config(tmp_path / "d", tokenizer="absent"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "file"}, "unknown source 'file': expected one of shakespeare, gutenberg, files, huggingface"),
        ({"source": "files"}, "source 'files' needs paths"),
        ({"source": "huggingface"}, "source 'huggingface' needs name"),
        ({"source": "shakespeare", "name": "x"}, "source 'shakespeare' has no option name; it has paths"),
        ({"val_fraction": 1.0}, "val_fraction must be at least 0 and below 1"),
        ({"shard_tokens": 0}, "shard_tokens must be at least 1"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(out="d", **changes)


def test_no_directory():
    with pytest.raises(ValueError, match="out is empty"):
        prepare(PrepareConfig())


def test_the_function_outlives_its_module(monkeypatch):
    """`import grist_data.prepare` binds the module under the function's name."""
    from grist_data import prepare as first

    importlib.import_module("grist_data.prepare")
    monkeypatch.setattr(grist_data, "prepare", sys.modules["grist_data.prepare"])  # as the import system does
    assert callable(first)
    with pytest.raises(ValueError, match="out is empty"):
        grist_data.prepare(PrepareConfig())


def test_a_new_source_is_a_line_in_sources(tmp_path, monkeypatch):
    monkeypatch.setitem(
        SOURCES, "mine", lambda: iter([Document(text, str(k)) for k, text in enumerate(corpus_texts(9))])
    )
    made = prepare(PrepareConfig(source="mine", out=str(tmp_path / "d"), vocab_size=300))
    assert sum(Shards.open(made, split).n_docs for split in ("train", "val")) == 9


def test_a_journal_of_an_earlier_version(config, tmp_path):
    (tmp_path / "d" / "parts").mkdir(parents=True)
    (tmp_path / "d" / "parts" / "000000-train.tok").write_bytes(b"old")
    (tmp_path / "d" / "journal.jsonl").write_text('{"event": "start", "version": 1, "settings": {}}\n')
    with pytest.raises(ValueError, match=r"is of version 1 .*, which is 2 now, .*start over with overwrite"):
        prepare(config(tmp_path / "d"))
    made = prepare(config(tmp_path / "d", overwrite=True))
    assert problems_of(made) == []
    assert not (made / "parts").exists()


def test_what_is_left_after_the_last_file_is_cleared(config, tmp_path, monkeypatch, dataset):
    made = config(tmp_path / "d", shard_tokens=3000)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "clear_work", lambda out: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(made)
    assert list((tmp_path / "d").glob("parts/*"))
    prepare(made)
    assert files_of(tmp_path / "d") == files_of(dataset)
    assert dataset_id(tmp_path / "d") == dataset_id(dataset)


def test_new_settings_do_not_disown_older_datasets():
    """A dataset made before a setting existed is the one that its default asks for."""
    settings = PrepareConfig(out="d").settings()
    assert {"clean", "deduplicate", "licence", "workers", "engine"} & set(settings) == set()
    assert PrepareConfig(out="d", deduplicate="exact", licence="MIT").settings()["licence"] == "MIT"


def test_what_was_left_out_is_said(config, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "grain"}\n{"text": "grain"}\n{"text": ""}\n{"text": "mi\xffll"}\n{"text": "flour"}\n')
    made = config(tmp_path / "d", paths=(str(file),), deduplicate="exact", errors="replace", vocab_size=257)
    source = read_manifest(prepare(made))["source"]
    said = capsys.readouterr().err
    assert "documents left out: 1 duplicate, 1 empty; 3 stay" in said
    assert "1 characters in 1 documents could not be read and are U+FFFD" in said
    assert source["replaced"] == {"documents": 1, "characters": 1}
    assert read_manifest(tmp_path / "d")["tokenizer"]["trained_by"].split()[0] in ("tokenizers", "gigatoken")
