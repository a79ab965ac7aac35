"""Token files of other programs: written here byte by byte, read as datasets, and written back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from foreign_files import imported, same, split_documents, write_llmc, write_megatron, write_nanogpt

from grist_data import Shards, Tokenizer
from grist_data.batches import Batches
from grist_data.export_tokens import export_tokens
from grist_data.foreign import megatron, nanogpt
from grist_data.foreign import token_file as token_file_module
from grist_data.import_tokens import main

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "data")}


@pytest.fixture(scope="module")
def tokenizer(dataset) -> Tokenizer:
    return Tokenizer.load(dataset)


@pytest.fixture(scope="module")
def documents(dataset) -> list[np.ndarray]:
    """Ids of the documents of the training split, the end-of-text id last."""
    return split_documents(Shards.open(dataset))


@pytest.fixture(params=[64, 1 << 18], ids=["short_pieces", "long_pieces"])
def piece_tokens(request, monkeypatch) -> int:
    """Borders of pieces must not show in what is read."""
    for module in (token_file_module, nanogpt, megatron):
        monkeypatch.setattr(module, "PIECE_TOKENS", request.param)
    return request.param


def test_nanogpt(tmp_path, dataset, documents, tokenizer, piece_tokens):
    file = write_nanogpt(tmp_path / "train.bin", documents)
    shards = imported(tmp_path, dataset, "nanogpt", file, end_of_document=tokenizer.eot_id, shard_tokens=3000)
    assert same(split_documents(shards), documents)
    assert len(shards.shards) > 2
    assert all(shard.header.n_tokens >= 3000 for shard in shards.shards[:-1])
    assert all(shard.header.encoding.eot_appended for shard in shards.shards)
    own = Shards.open(dataset)
    assert shards.n_bytes == own.n_bytes
    hashes = [np.concatenate([shard.doc_hashes for shard in split.shards]) for split in (shards, own)]
    assert np.array_equal(hashes[0], hashes[1])
    next(Batches(shards, sequence_length=16, global_batch_size=4, seed=0))


def test_megatron(tmp_path, dataset, documents, piece_tokens):
    halves = [[ids[:3], ids[3:]] for ids in documents]  # a document of two sequences
    halves.insert(1, [documents[0][:0]])  # and one without ids, which is left out
    prefix = write_megatron(tmp_path / "corpus.v1", halves, "<i4", 4)
    for name, path in (("a", prefix), ("b", Path(f"{prefix}.idx"))):
        (tmp_path / name).mkdir()
        assert same(split_documents(imported(tmp_path / name, dataset, "megatron", path)), documents)


def test_megatron_that_begins_with_an_empty_document(tmp_path, dataset, documents):
    prefix = write_megatron(tmp_path / "corpus", [[], [documents[0][:0]], *([ids] for ids in documents)])
    assert same(split_documents(imported(tmp_path, dataset, "megatron", prefix)), documents)


def test_llmc_shards_with_a_document_across_their_border(tmp_path, dataset, documents, tokenizer, piece_tokens):
    moved = [np.concatenate([ids[-1:], ids[:-1]]) for ids in documents]  # llm.c puts the marker first
    stream = np.concatenate(moved)
    cut = len(moved[0]) + 5
    files = [write_llmc(tmp_path / "a_0.bin", stream[:cut]), write_llmc(tmp_path / "a_1.bin", stream[cut:])]
    shards = imported(tmp_path, dataset, "llmc", *files, begin_of_document="<|endoftext|>", shard_tokens=2000)
    assert same(split_documents(shards), moved)
    assert not shards.shards[0].header.encoding.eot_appended
    own = np.concatenate([shard.doc_hashes for shard in Shards.open(dataset).shards])
    assert np.array_equal(np.concatenate([shard.doc_hashes for shard in shards.shards]), own)


@pytest.mark.parametrize("ended", [True, False])
def test_whether_all_documents_end_with_the_end_of_text_is_seen(tmp_path, dataset, tokenizer, monkeypatch, ended):
    """Also of a document that ends where a piece does, which shows only when the next begins."""
    monkeypatch.setattr(token_file_module, "PIECE_TOKENS", 4)
    first = np.array([5, 9, 9, tokenizer.eot_id if ended else 9])
    file = write_llmc(tmp_path / "a.bin", np.concatenate([first, [5, 9, 9, 9, tokenizer.eot_id]]))
    shards = imported(tmp_path, dataset, "llmc", file, begin_of_document=5)
    assert shards.n_docs == 2
    assert shards.shards[0].header.encoding.eot_appended == ended


def test_llmc_with_32_bit_ids(tmp_path, dataset, documents, tokenizer):
    file = write_llmc(tmp_path / "a.bin", np.concatenate(documents), 20240801, 7, "<u4")
    assert same(
        split_documents(imported(tmp_path, dataset, "llmc", file, end_of_document=str(tokenizer.eot_id))), documents
    )


@pytest.mark.parametrize("kind", ["list", "large_list"])
def test_parquet_rows_are_documents(tmp_path, dataset, documents, kind):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [documents[0][:0].tolist(), *(ids.tolist() for ids in documents), []]
    of_type = getattr(pyarrow, f"{kind}_")(pyarrow.int32()) if kind == "list" else pyarrow.large_list(pyarrow.int64())
    table = pyarrow.table({"text": ["x"] * len(rows), "ids": pyarrow.array(rows, of_type)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    shards = imported(tmp_path, dataset, "parquet", tmp_path / "a.parquet", column="ids", shard_tokens=2500)
    assert same(split_documents(shards), documents)
    assert len(shards.shards) > 1


def test_packed_parquet(tmp_path, dataset, documents, tokenizer):
    """Rows of one length, cut without regard to documents; the marker says where those end."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    ids = np.concatenate(documents)
    rows = ids[: len(ids) // 64 * 64].reshape(-1, 64).tolist()
    table = pyarrow.table({"input_ids": pyarrow.array(rows, pyarrow.list_(pyarrow.int32(), 64))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    shards = imported(tmp_path, dataset, "parquet", tmp_path / "a.parquet", end_of_document=tokenizer.eot_id)
    assert np.array_equal(shards.read(0, shards.n_tokens), np.ravel(rows))
    assert shards.n_docs == len(documents)
    with pytest.raises(ValueError, match="no column 'tokens'; it has input_ids"):
        imported(tmp_path / "no", dataset, "parquet", tmp_path / "a.parquet", column="tokens")


def test_one_document_a_file(tmp_path, dataset, documents):
    files = [write_nanogpt(tmp_path / f"{k}.bin", [ids[:-1]]) for k, ids in enumerate(documents[:3])]
    shards = imported(tmp_path, dataset, "nanogpt", *files, document_per_file=True)
    assert same(split_documents(shards), [ids[:-1] for ids in documents[:3]])
    assert not shards.shards[0].header.encoding.eot_appended


def test_a_tokenizer_that_is_not_byte_level(tmp_path):
    """Its texts come from decoding whole documents."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    engine = tokenizers.Tokenizer(models.WordLevel({"grain": 0, "mill": 1, "naïve": 2}, unk_token="mill"))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    engine.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "tokenizer.json").write_text(engine.to_str())
    ids = np.array([0, 2, 3, 1, 3], np.uint16)
    shards = imported(tmp_path, tmp_path, "nanogpt", write_nanogpt(tmp_path / "a.bin", [ids]), end_of_document="3")
    assert shards.n_bytes == len("grain naïve".encode()) + len("mill")


@pytest.mark.parametrize("format", ["nanogpt", "megatron"])
def test_there_and_back_is_the_same_dataset(tmp_path, config, format):
    """Also the same name: `dataset_id` is of the content."""
    from grist_data.prepare import prepare

    whole = prepare(config(tmp_path / "whole"))
    export_tokens(whole, tmp_path / "foreign", format)
    suffix = {"nanogpt": "{}.bin", "megatron": "{}_text_document.idx"}[format]
    train, val = (str(tmp_path / "foreign" / suffix.format(split)) for split in ("train", "val"))
    arguments = [format, "--train", train, "--val", val, "--tokenizer", str(tmp_path / "foreign" / "tokenizer.json")]
    arguments += ["--end_of_document", "<|endoftext|>"] if format == "nanogpt" else []
    assert main([*arguments, "--out", str(tmp_path / "back")]) == 0
    for split in ("train", "val"):
        assert Shards.open(tmp_path / "back", split).dataset_id == Shards.open(whole, split).dataset_id
    source = json.loads((tmp_path / "back" / "dataset.json").read_text())["source"]
    assert source["name"] == f"import from {format}"


def test_exported_bytes(tmp_path, dataset, documents, tokenizer, piece_tokens):
    """nanoGPT's layout and Megatron's, as the writers of this file have them."""
    export_tokens(dataset, tmp_path / "nanogpt", "nanogpt")
    expected = write_nanogpt(tmp_path / "expected.bin", documents)
    assert (tmp_path / "nanogpt" / "train.bin").read_bytes() == expected.read_bytes()
    export_tokens(dataset, tmp_path / "megatron", "megatron")
    prefix = write_megatron(tmp_path / "expected_megatron", [[ids] for ids in documents])
    for suffix in (".bin", ".idx"):
        written = tmp_path / "megatron" / f"train_text_document{suffix}"
        assert written.read_bytes() == Path(f"{prefix}{suffix}").read_bytes()
    assert Tokenizer.load(tmp_path / "nanogpt").sha256 == tokenizer.sha256


def test_large_vocabularies_choose_wider_types(dataset, tmp_path):
    class Large:
        vocab_size = 100_000
        n_tokens = 0

    assert megatron.dtype_for(65_499) == np.dtype("<u2")
    assert megatron.dtype_for(65_500) == np.dtype("<i4")
    with pytest.raises(ValueError, match=r"does not fit uint16.*train\.py"):
        nanogpt.write(tmp_path / "a.bin", Large(), "uint16")  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize("module", ["import", "export"])
def test_the_commands_run_as_modules(module):
    command = [sys.executable, "-m", f"grist_data.{module}", "--help"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert f"python -m grist_data.{module} nanogpt" in done.stdout
