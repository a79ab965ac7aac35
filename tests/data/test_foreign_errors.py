"""Importing what is broken or of another kind says what and where, and leaves nothing behind; so does an interruption."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from foreign_files import imported, split_documents, write_llmc, write_megatron, write_nanogpt

from grist_data import Shards
from grist_data.export_tokens import main as export_main
from grist_data.import_tokens import ImportConfig, main


@pytest.fixture(scope="module")
def documents(dataset) -> list[np.ndarray]:
    """Ids of the documents of the training split, the end-of-text id last."""
    return split_documents(Shards.open(dataset))


def broken_files(folder: Path, documents: list[np.ndarray]) -> dict[str, tuple[str, Path, dict]]:
    """name -> (format, file, options)."""
    ids = np.concatenate(documents)
    prefix = write_megatron(folder / "whole", [[each] for each in documents])
    index = Path(f"{prefix}.idx").read_bytes()

    def pair(name: str, changed: bytes, body: bytes | None = None) -> Path:
        (folder / f"{name}.idx").write_bytes(changed)
        (folder / f"{name}.bin").write_bytes(Path(f"{prefix}.bin").read_bytes() if body is None else body)
        return folder / name

    moved = bytearray(index)
    struct.pack_into("<q", moved, 34 + 4 * len(documents) + 8, 1)
    falling = bytearray(index)
    struct.pack_into("<q", falling, len(index) - 16, len(documents) + 3)
    half = folder / "half.bin"
    half.write_bytes(ids.astype("<u2").tobytes()[:-1])
    short = write_llmc(folder / "short.bin", ids)
    short.write_bytes(short.read_bytes()[:-2])
    beyond = ids.astype(np.int64)
    beyond[70] = 320
    marker = {"end_of_document": 0}
    return {
        "cut idx": ("megatron", pair("cut", index[:-1]), {}),
        "cut head": ("megatron", pair("head", index[:20]), {}),
        "magic": ("megatron", pair("magic", b"TNTIDX\0\0" + index[8:]), {}),
        "version": ("megatron", pair("version", index[:9] + b"\x02" + index[10:]), {}),
        "float": ("megatron", pair("float", index[:17] + b"\x07" + index[18:]), {}),
        "moved": ("megatron", pair("moved", bytes(moved)), {}),
        "documents": ("megatron", pair("documents", bytes(falling)), {}),
        "cut bin": ("megatron", pair("bin", index, ids.astype("<u2").tobytes()[:-2]), {}),
        "half an id": ("nanogpt", half, marker),
        "wide": ("nanogpt", write_nanogpt(folder / "wide.bin", documents, "<u4"), marker),
        "llmc as nanogpt": ("nanogpt", write_llmc(folder / "l.bin", ids), marker),
        "nanogpt as llmc": ("llmc", write_nanogpt(folder / "n.bin", documents), marker),
        "llmc version": ("llmc", write_llmc(folder / "v.bin", ids, version=2), marker),
        "llmc short": ("llmc", short, marker),
        "beyond": ("nanogpt", write_nanogpt(folder / "beyond.bin", [beyond]), marker),
        "no marker": ("nanogpt", write_nanogpt(folder / "never.bin", [ids[ids != 5]]), {"end_of_document": 5}),
        "empty": ("nanogpt", write_nanogpt(folder / "empty.bin", []), marker),
        "absent": ("llmc", folder / "absent.bin", marker),
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut idx", r"cut\.idx is truncated: .* take [\d,]+ bytes, but it has [\d,]+; copy it again"),
        ("cut head", r"head\.idx is truncated: 20 bytes, shorter than its 34-byte header"),
        ("magic", r"magic\.idx is no index of Megatron's: it begins with b'TNTIDX"),
        ("version", r"version\.idx has version 2 at byte 9, .* reads version 1"),
        ("float", r"float\.idx has type code 7 at byte 17"),
        ("moved", r"moved\.idx: sequence 1 should begin at byte [\d,]+ of the \.bin.*says 1 \(byte"),
        ("documents", r"documents\.idx: the document index must rise from 0 to the number of sequences, \d+"),
        ("cut bin", r"bin\.bin has [\d,]+ ids, but .*bin\.idx describes [\d,]+"),
        ("half an id", r"half\.bin has [\d,]+ bytes, no whole number of uint16 ids"),
        ("wide", r"wide\.bin holds wider ids.*give dtype uint32"),
        ("llmc as nanogpt", r"l\.bin begins with the header of an llm\.c shard.*import it as llmc"),
        ("nanogpt as llmc", r"n\.bin is no shard of llm\.c: it begins with \d+, expected 20240520"),
        ("llmc version", r"v\.bin has version 2 at byte 4, expected 1"),
        ("llmc short", r"short\.bin is truncated: its header announces"),
        ("beyond", r"beyond\.bin, byte 140: id 320 is outside the tokenizer's vocabulary of 320 ids"),
        ("no marker", r"id 5 never comes in .*never\.bin, so it does not stand after documents"),
        ("empty", r"empty\.bin has no tokens: it is 0 bytes long"),
        ("absent", r"no token file at .*absent\.bin"),
    ],
)
def test_broken_files_are_named_and_nothing_is_left(tmp_path, dataset, documents, name, message):
    format_, file, options = broken_files(tmp_path, documents)[name]
    with pytest.raises((ValueError, OSError), match=message):
        imported(tmp_path, dataset, format_, file, **options)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("documents", [[], [[]]])
def test_a_pair_without_sequences(tmp_path, dataset, documents):
    prefix = write_megatron(tmp_path / "nothing", documents)
    with pytest.raises(ValueError, match=r"nothing\.idx describes no sequences"):
        imported(tmp_path, dataset, "megatron", prefix)


def test_ids_of_a_narrower_type_than_the_vocabulary(tmp_path, dataset, documents):
    prefix = write_megatron(tmp_path / "narrow", [[ids % 100] for ids in documents], "<u1", 1)
    with pytest.raises(ValueError, match=r"narrow holds uint8 ids, too narrow for the tokenizer's vocabulary of 320"):
        imported(tmp_path, dataset, "megatron", prefix)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "webdataset"}, "unknown format 'webdataset'"),
        ({"format": "nanogpt"}, "do not say where documents end"),
        ({"format": "megatron", "end_of_document": 0}, r"\.idx says where documents end"),
        ({"format": "megatron", "dtype": "int32"}, "dtype is an option of nanogpt"),
        ({"format": "llmc", "end_of_document": 0, "document_per_file": True}, "give one of"),
        ({"format": "megatron", "shard_tokens": 0}, "shard_tokens must be at least 1"),
        ({"format": "megatron", "train": ()}, "train is empty"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        ImportConfig(**{"train": ("a",), "tokenizer": "t", "out": "o", **options})


def test_a_marker_must_be_of_the_tokenizer(tmp_path, dataset, documents):
    file = write_nanogpt(tmp_path / "a.bin", documents)
    for marker in ("<|end|>", 320, "-1"):
        with pytest.raises(ValueError, match=r"neither an id below 320 nor a special token.*<\|endoftext\|>"):
            imported(tmp_path, dataset, "nanogpt", file, end_of_document=marker)


def test_a_directory_that_is_there_is_kept(tmp_path, dataset, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert export_main(["nanogpt", str(dataset), "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_what_a_killed_import_left_does_not_stop_the_next(tmp_path, dataset, documents):
    (tmp_path / "out.part" / "folder").mkdir(parents=True)
    (tmp_path / "out.part" / "train-00000-of-00009.tok").write_bytes(b"half")
    shards = imported(tmp_path, dataset, "nanogpt", write_nanogpt(tmp_path / "a.bin", documents), end_of_document=0)
    assert [path.name for path in sorted(shards.directory.glob("*.tok"))] == ["train-00000-of-00001.tok"]


def test_interruption_leaves_nothing(tmp_path, dataset, documents, monkeypatch, capsys):
    file = write_nanogpt(tmp_path / "a.bin", documents)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("grist_data.finish.write_manifest", interrupted)
    arguments = ["nanogpt", "--train", str(file), "--tokenizer", str(dataset), "--end_of_document", "0"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
