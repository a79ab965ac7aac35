from __future__ import annotations

import shutil

import numpy as np
import pytest
import tiny_house

from grist_data import Shards
from grist_tools.inspect_data import count_tokens, document_borders, document_text, main, sample, window_text


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_house.dataset(tmp_path_factory.mktemp("house") / "dataset", val_fraction=0.3)


@pytest.fixture(scope="module")
def shards(dataset):
    return Shards.open(dataset, split="train")


def test_the_summary_holds_the_numbers_of_the_dataset(dataset, shards, capsys):
    assert main([str(dataset)]) == 0
    out = capsys.readouterr().out
    assert shards.dataset_id in out
    assert shards.tokenizer_sha256 in out
    row = next(line for line in out.splitlines() if line.startswith("train ")).split()
    assert row[1:3] == [f"{shards.n_docs:,}", f"{shards.n_tokens:,}"]
    assert f"{shards.n_bytes / shards.n_tokens:.3f}" in row
    lengths = np.diff(document_borders(shards))
    assert f"{lengths.max():,}" in out
    assert f"{lengths.mean():,.1f}" in out


def test_a_document_reads_as_it_was_written(shards):
    of_text = tiny_house.tokenizer()
    texts = [document_text(shards, of_text, number, 10_000) for number in range(shards.n_docs)]
    for text in texts:
        body = text.split("\n", 1)[1]
        assert body.endswith("\n<|endoftext|>")
        assert any(paragraph in body for paragraph in tiny_house.PARAGRAPHS)
    assert len(set(texts)) == shards.n_docs


def test_a_long_document_loses_its_middle(shards):
    of_text = tiny_house.tokenizer()
    whole = document_text(shards, of_text, 1, 10_000).split("\n", 1)[1]
    short = document_text(shards, of_text, 1, 40).split("\n", 1)[1]
    assert short.startswith(whole[:20])
    assert short.endswith(whole[-20:])
    assert f"[... {len(whole) - 40:,} characters ...]" in short


def test_a_window_shows_every_token(shards):
    of_text = tiny_house.tokenizer()
    heading, *body = window_text(shards, of_text, 5, 30).split("\n")
    assert heading == "--- window: tokens 5 to 35"
    ids = shards.read(5, 30).tolist()
    spelled = [f"<{i}>" if "\ufffd" in of_text.decode([i]) else of_text.decode([i]).replace("\n", "\\n") for i in ids]
    assert body == ["|".join(spelled)]


def test_counts_are_those_of_the_tokens(dataset, shards, capsys):
    counts = count_tokens(shards)
    assert counts.sum() == shards.n_tokens
    assert counts[shards.eot_id] == shards.n_docs
    assert main([str(dataset), "--split", "train", "--counts"]) == 0
    out = capsys.readouterr().out
    assert f"train: {(counts > 0).sum():,} of {shards.vocab_size:,} ids occur" in out
    assert f"{counts.max():,}" in out


def test_samples_headers_and_verification(dataset, shards, capsys):
    arguments = ["--documents", "2", "--windows", "3", "--length", "8", "--headers", "--verify"]
    assert main([str(dataset), *arguments]) == 0
    out = capsys.readouterr().out
    assert out.count("--- document ") == 4
    assert out.count("--- window: ") == 6
    assert f"{shards.shards[0].header.root:016x}" in out
    assert "every checksum matches" in out
    assert main([str(dataset), *arguments]) == 0
    assert capsys.readouterr().out == out


def test_sample_never_asks_for_more_than_there_is():
    assert sample(5, 3, 0) == [0, 1, 2]
    assert sample(2, 100, 0) != sample(2, 100, 1)
    assert sample(0, 3, 0) == []


def test_a_flipped_byte_is_found(dataset, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(dataset, damaged)
    file = next(damaged.glob("train-*.tok"))
    data = bytearray(file.read_bytes())
    data[4096 + 10] ^= 1
    file.write_bytes(data)
    assert main([str(damaged)]) == 0
    assert main([str(damaged), "--verify"]) == 2
    assert "block 0 of section tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"), [(["absent"], "no dataset in"), (["{dataset}", "--split", "test"], "has no split 'test'")]
)
def test_bad_input_is_told(dataset, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(dataset=dataset) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
