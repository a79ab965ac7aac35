"""`python -m grist_data.inspect`: numbers that agree with the tokens, documents that read as written, one page."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from text_corpus import corpus_texts

from grist_data import Shards, document_index, statistics
from grist_data.document_index import DocumentIndex
from grist_data.inspect import main, report, text_of
from grist_data.statistics import Lengths, count_ids, document_lengths, entropy_bits

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "data")}


@pytest.fixture(scope="module")
def shards(dataset) -> Shards:
    return Shards.open(dataset)


def lengths_of(shards: Shards) -> np.ndarray:
    ends = [*shards.document_ends(0, shards.n_tokens).tolist(), shards.n_tokens]
    return np.diff(ends, prepend=0)


@pytest.mark.parametrize(("counted_below", "piece"), [(1 << 20, 1 << 18), (250, 7)])
def test_lengths(shards, monkeypatch, counted_below, piece):
    """Also where some are too long to be counted one by one, and shards are read in pieces."""
    monkeypatch.setattr(statistics, "_COUNTED_BELOW", counted_below)
    monkeypatch.setattr(document_index, "PIECE_DOCUMENTS", piece)
    expected = lengths_of(shards)
    found = document_lengths(shards)
    assert (len(found.long) > 0) == (counted_below == 250)
    assert found.n_docs == len(expected)
    assert found.mean == pytest.approx(expected.mean(), rel=1e-12)
    for share in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1):
        assert found.quantile(share) == np.quantile(expected, share, method="inverted_cdf")
    edges = np.geomspace(1, expected.max() + 1, 9)
    assert found.histogram(edges).tolist() == np.histogram(expected, edges)[0].tolist()
    assert found.histogram(edges).sum() == len(expected)


def test_counts(shards, monkeypatch):
    expected = np.bincount(shards.read(0, shards.n_tokens), minlength=shards.vocab_size)
    monkeypatch.setattr(statistics, "_PIECE_TOKENS", 101)
    assert np.array_equal(count_ids(shards), expected)


def test_entropy():
    assert entropy_bits(np.array([4, 0, 2, 1, 1])) == pytest.approx(1.75, abs=1e-12)
    assert entropy_bits(np.array([7, 0])) == 0


def test_documents_by_number(shards):
    index = DocumentIndex(shards)
    ends = np.cumsum(lengths_of(shards))
    assert [index.span(k) for k in range(index.n_docs)] == list(zip([0, *ends[:-1]], ends, strict=True))
    assert np.array_equal(index.ends(2, index.n_docs - 1), ends[2:-1])


def test_what_is_printed(dataset, shards, capsys):
    assert main([str(dataset)]) == 0
    out = capsys.readouterr().out
    assert shards.dataset_id in out
    assert shards.tokenizer_sha256 in out
    row = next(line for line in out.splitlines() if line.startswith("train "))
    assert row.split()[1:5] == [
        f"{shards.n_docs:,}", f"{shards.n_tokens:,}", f"{shards.n_bytes:,}", f"{shards.n_bytes / shards.n_tokens:.3f}"
    ]  # fmt: skip
    counts = count_ids(shards)
    assert f"train: {(counts > 0).sum()} of 320 ids occur; {entropy_bits(counts):.2f} bits a token" in out
    assert f"{counts.max():,}" in out
    assert out.count("--- train, document ") == out.count("--- val, document ") == 3


def test_documents_are_shown_as_written(dataset):
    found = report(dataset, split="val", counts=False, documents=100, characters=10_000)
    texts = corpus_texts()
    samples = found["val"].samples
    assert len(samples) == found["val"].shards.n_docs
    assert all(text.removesuffix("<|endoftext|>") in texts for _, text in samples)
    short = report(dataset, split="val", counts=False, documents=100, characters=20)["val"].samples
    lengths = lengths_of(found["val"].shards)
    assert [text for _, text in short] == [
        f"{text[:20]} [... {length:,} tokens in all]" for (_, text), length in zip(samples, lengths, strict=True)
    ]
    assert report(dataset, documents=2, seed=1)["train"].samples != report(dataset, documents=2)["train"].samples


def test_without_counts(dataset, capsys):
    assert main([str(dataset), "--no_counts", "--documents", "0"]) == 0
    out = capsys.readouterr().out
    assert "ids occur" not in out
    assert "---  " in out
    assert "document 0" not in out


@pytest.mark.parametrize("counts", [True, False])
def test_the_page_stands_alone(dataset, tmp_path, counts, capsys):
    options = [] if counts else ["--no_counts"]
    pages = [tmp_path / "new" / "a.html", tmp_path / "b.html"]
    for page in pages:
        assert main([str(dataset), "--page", str(page), *options]) == 0
    assert pages[0].read_bytes() == pages[1].read_bytes()
    text = pages[0].read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!#)", text.replace("xlink:href", "href"))
    figure = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    titles = "".join(figure.itertext())
    assert "Lengths of documents" in titles
    assert ("Token frequencies" in titles) == counts
    assert html.escape(text_of(dataset, report(dataset, counts=counts))) in text


def test_lengths_of_equal_documents():
    found = Lengths(np.array([0, 0, 3]), np.zeros(0, np.int64))
    assert [found.quantile(share) for share in (0, 0.5, 1)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"), [(["absent"], "no dataset in absent"), (["{}", "--split", "test"], "has no split 'test'")]
)
def test_bad_input_is_told(dataset, arguments, message, capsys):
    assert main([argument.format(dataset) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_file_is_noticed(own_dataset, capsys):
    path = sorted(own_dataset.glob("train-*.tok"))[0]
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert main([str(own_dataset)]) == 2
    assert "block 0 of section tokens" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["inspect", "merge", "diff"])
def test_the_commands_run_as_modules(module):
    """And `inspect` does not stand in the way of the standard library's."""
    command = [sys.executable, "-m", f"grist_data.{module}", "--help"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert f"python -m grist_data.{module} datasets/" in done.stdout
