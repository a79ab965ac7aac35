"""The loss mask in the files, and in everything that reads them: a target that is not trained is -100, and no other is lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_corpus import SPECIALS, conversations, write_conversations
from text_corpus import corpus_texts, write_jsonl
from torch.utils.data import DataLoader

from grist_data import Batches, Shards, Tokenizer, evaluation_batches
from grist_data.batch import IGNORE
from grist_data.diff import differences
from grist_data.document_index import DocumentIndex
from grist_data.export_tokens import export_tokens
from grist_data.inspect import main as inspect_main
from grist_data.loader import TokenDataset, TokenStream
from grist_data.manifest import read_manifest
from grist_data.merge import merge
from grist_data.mixture import Mixture, Stage
from grist_data.prepare import prepare
from grist_data.prepare_config import PrepareConfig
from grist_data.shard_header import HEADER_BYTES, Encoding, pack, unpack
from grist_data.shard_writer import write_shard
from grist_data.shards import ShardFile
from grist_data.supply import Supply
from grist_data.verify import problems_of

T = 48


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    file = write_conversations(folder / "chat.jsonl", conversations(90))
    return prepare(
        PrepareConfig(
            source="conversations",
            paths=(str(file),),
            chat_template="chatml",
            special_tokens=SPECIALS,
            vocab_size=320,
            val_fraction=0.15,
            unit_bytes=3000,
            shard_tokens=3000,
            workers=1,
            out=str(folder / "d"),
        )
    )


@pytest.fixture(scope="module")
def plain(masked, tmp_path_factory) -> Path:
    """Plain text under the same tokenizer."""
    folder = tmp_path_factory.mktemp("plain")
    file = write_jsonl(folder / "text.jsonl", corpus_texts(40))
    return prepare(
        PrepareConfig(
            source="files", paths=(str(file),), tokenizer=str(masked), val_fraction=0.15, out=str(folder / "d")
        )
    )


@pytest.fixture(scope="module")
def shards(masked) -> Shards:
    found = Shards.open(masked)
    assert len(found.shards) > 1
    return found


def whole(shards: Shards) -> tuple[np.ndarray, np.ndarray]:
    return shards.read(0, shards.n_tokens).astype(np.int64), shards.trained(0, shards.n_tokens)


def expected_targets(shards: Shards, offset: int, n: int = T) -> list[int]:
    """Of a window, the slow way."""
    tokens, trained = whole(shards)
    return [int(tokens[k]) if trained[k] else IGNORE for k in range(offset + 1, offset + n + 1)]


def targets_of(batches) -> list[list[int]]:
    rows = [row for batch in batches for row in batch.targets_BT.tolist()]
    assert sum(batch.n_valid_tokens for batch in batches) == sum(target != IGNORE for row in rows for target in row)
    return rows


# The file.


def test_a_mask_is_a_bit_a_token(tmp_path):
    draw = np.random.default_rng(0)
    encoding = Encoding(2, 100, 0, None, True, "00" * 32, "11" * 32)
    tokens, mask = draw.integers(0, 100, 1_000_003), draw.random(1_000_003) < 0.3
    ends = np.array([10, 1_000_003])
    header = write_shard(
        tmp_path / "a.tok",
        encoding,
        [tokens],
        ends,
        bytes(32),
        {},
        loss_mask=np.split(mask, [1, 1, 4, 99_999, 100_007]),
    )
    offset, size = header.sections["loss_mask"]
    assert size == -(-1_000_003 // 8)
    packed = (tmp_path / "a.tok").read_bytes()[offset : offset + size]
    assert packed == np.packbits(mask, bitorder="little").tobytes()
    for verify in ("header", "lazy", "full"):
        shard = ShardFile(tmp_path / "a.tok", verify)
        for start, stop in ((0, 0), (0, 1), (7, 9), (8, 16), (5, 5), (1_000_000, 1_000_003), (0, 1_000_003)):
            assert np.array_equal(shard.trained(start, stop), mask[start:stop])
    write_shard(tmp_path / "b.tok", encoding, [tokens], ends, bytes(32), {}, loss_mask=[mask])
    assert (tmp_path / "b.tok").read_bytes() == (tmp_path / "a.tok").read_bytes()
    for wrong in ([mask[:-1]], [mask, mask[:1]]):
        with pytest.raises(ValueError, match="expected a loss mask of 1000003 tokens, but got 100000"):
            write_shard(tmp_path / "c.tok", encoding, [tokens], ends, bytes(32), {}, loss_mask=wrong)
        assert not (tmp_path / "c.tok").exists()


def test_flags_and_section_must_agree(masked, tmp_path):
    page = bytearray(next(masked.glob("train-*.tok")).read_bytes()[:HEADER_BYTES])
    header = unpack(bytes(page), Path("a.tok"))
    assert header.has_loss_mask
    offset, size = header.sections["loss_mask"]
    short = dataclasses.replace(header, sections={**header.sections, "loss_mask": (offset, size - 1)})
    with pytest.raises(ValueError, match=f"section loss_mask has {size - 1} bytes for {header.n_tokens} tokens"):
        unpack(pack(short), Path("a.tok"))


def test_every_flipped_bit_of_a_mask_is_found(masked, tmp_path):
    own = prepare_copy(masked, tmp_path)
    path = sorted(own.glob("train-*.tok"))[0]
    sound = path.read_bytes()
    offset, size = ShardFile(path).header.sections["loss_mask"]
    for place in (0, size // 2, size - 1):
        damaged = bytearray(sound)
        damaged[offset + place] ^= 4
        path.write_bytes(damaged)
        (problem,) = problems_of(own)
        assert f"{path.name}: block 0 of section loss_mask" in problem
        with pytest.raises(ValueError, match="section loss_mask"):
            Shards.open(own, verify="lazy").trained(0, 10)
        with pytest.raises(ValueError, match="section loss_mask"):
            Shards.open(own, verify="full")
    path.write_bytes(sound)
    (own / "chat_template.jinja").write_text("{{ messages }}")
    (problem,) = problems_of(own)
    assert "chat_template.jinja is not the chat template that the conversations were written by" in problem


def prepare_copy(dataset: Path, tmp_path: Path) -> Path:
    own = tmp_path / "own"
    own.mkdir()
    for file in dataset.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    return own


# Batches.


@pytest.mark.parametrize("micro", [None, 1])
def test_windows(shards, micro):
    batches = Batches(shards, T, 4, seed=3, micro_batch_size=micro)
    for step in range(40):
        offsets = batches.order.offsets(np.arange(4 * step, 4 * step + 4))
        found = next(batches)
        assert targets_of(found) == [expected_targets(shards, offset) for offset in offsets.tolist()]


def test_a_row_without_any_target(shards):
    """A window of four tokens lies inside the words of a user often enough."""
    batches = Batches(shards, 4, 8, seed=0, micro_batch_size=1)
    counts = [batch.n_valid_tokens for _ in range(20) for batch in next(batches)]
    assert 0 in counts
    assert 4 in counts


def test_the_next_document_and_the_mask(shards):
    found = next(Batches(shards, 300, 4, seed=0, documents=True, ignore_next_document=True))[0]
    plain = next(Batches(shards, 300, 4, seed=0))[0]
    assert torch.equal(found.targets_BT, plain.targets_BT)  # no answer begins a document
    assert found.cu_seqlens is not None


def test_the_next_document_where_all_of_it_is_trained(masked, plain, tmp_path):
    both = Shards.open(merge([masked, plain], tmp_path / "both"))
    ends = set(DocumentIndex(both).ends(0, both.n_docs).tolist())
    batches = Batches(both, T, 1, seed=0, ignore_next_document=True)
    begun = 0
    for position in range(200):
        (offset,) = batches.order.offsets(np.array([position])).tolist()
        expected = expected_targets(both, offset)
        for k in range(T):
            if offset + k + 1 in ends:
                begun += expected[k] != IGNORE
                expected[k] = IGNORE
        assert targets_of(next(batches)) == [expected]
    assert begun > 0


def test_packing(shards, tmp_path):
    """In an epoch every trained token is a target exactly once."""
    batches = Batches(shards, T, 1, seed=0, packing="best-fit", packing_cache=tmp_path)
    tokens, trained = whole(shards)
    rows: Any = batches.order.rows
    bins = rows.bins
    ends = set(DocumentIndex(shards).ends(0, shards.n_docs).tolist())
    seen = []
    for position in range(batches.samples_per_epoch):
        (number,) = batches.order.offsets(np.array([position])).tolist()
        (row,) = targets_of(next(batches))
        expected, own = [IGNORE] * T, []
        at = 0
        for start, length in zip(*(part.tolist() for part in bins.pieces(number)), strict=True):
            goes_on = length == T and start + length not in ends
            for k in range(length if goes_on else length - 1):
                if trained[start + k + 1]:
                    expected[at + k] = int(tokens[start + k + 1])
                    own.append(start + k + 1)
            at += length
        assert row == expected
        seen += own
    assert sorted(seen) == np.flatnonzero(trained).tolist()
    assert len(seen) == shards.n_trained_tokens


def test_a_mixture_with_plain_text(shards, plain):
    sources = {"chat": shards, "text": Shards.open(plain)}
    batches = Batches(Mixture(sources, {"chat": 0.5, "text": 0.5}), T, 6, seed=1)
    rows_of = {"chat": 0, "text": 0}
    joined: Any = batches.order.rows
    for step in range(10):
        samples = batches.order.samples(np.arange(6 * step, 6 * step + 6))
        offsets = batches.order.offsets(np.arange(6 * step, 6 * step + 6))
        rows = targets_of(next(batches))
        for k, row in enumerate(rows):
            name = batches.order.names[samples.source[k]]
            begin = int(offsets[k] - joined.starts[samples.source[k]])
            assert row == expected_targets(sources[name], begin)
            rows_of[name] += 1
            if name == "text":
                assert IGNORE not in row
    assert rows_of == {"chat": 30, "text": 30}


def test_stages(shards, plain):
    """Where sequences become longer, what was trained before is masked, too; nothing is a target twice."""
    mixture = Mixture(
        {"chat": shards},
        {"chat": 1.0},
        stages=(Stage(5, sequence_length=2 * T), Stage(10, sequence_length=T)),
        unit_tokens=2 * T,
    )
    batches = Batches(mixture, T, 1, seed=1, jitter=False)
    masked_twice = 0
    for position in range(16):
        (offset,) = batches.order.offsets(np.array([position])).tolist()
        (row,) = targets_of(next(batches))
        expected = expected_targets(shards, offset, len(row))
        skip = batches.order.masked.get(position, 0)
        assert row == [IGNORE] * skip + expected[skip:]
        masked_twice += sum(target != IGNORE for target in expected[:skip])
    assert masked_twice > 0


def test_what_ranks_train_on_is_what_one_would(shards):
    whole_step = targets_of(next(Batches(shards, T, 8, seed=0)))
    of_ranks = [targets_of(next(Batches(shards, T, 8, seed=0, rank=rank, world_size=2))) for rank in range(2)]
    assert of_ranks[0] + of_ranks[1] == whole_step


def test_cuda_gets_the_same(shards):
    """The part that runs on the device, run here."""
    batches = Batches(shards, T, 4, seed=0)
    step = next(batches._steps)
    supply = Supply(batches.order, torch.device("cpu"), False, False, 4 * (T + 1))
    rows = np.empty((4, T + 1), shards.dtype)
    shards.gather(step.offsets, rows)
    on_cuda, on_cpu = (
        supply._on_cuda(step, torch.from_numpy(rows.astype(np.int32)), 1, 4),
        supply._on_cpu(step, rows, 1, 4),
    )
    assert torch.equal(on_cuda.targets_BT, on_cpu.targets_BT)
    assert on_cuda.n_valid_tokens == on_cpu.n_valid_tokens


@pytest.mark.parametrize("options", [{}, {"stride": 13}, {"documents": True}])
def test_evaluation_scores_every_trained_token_once(masked, options):
    shards = Shards.open(masked, "val")
    tokens, trained = whole(shards)
    expected = np.bincount(tokens[1:][trained[1:]], minlength=400)
    found = np.zeros(400, np.int64)
    for rank in range(2):
        for batch in evaluation_batches(shards, T, 3, rank=rank, world_size=2, **options):
            targets = batch.targets_BT[batch.targets_BT != IGNORE].numpy()
            assert batch.n_valid_tokens == len(targets)
            found += np.bincount(targets, minlength=400)
    assert np.array_equal(found, expected)
    assert found.sum() == shards.n_trained_tokens


def test_the_loader(shards):
    expected = targets_of(next(Batches(shards, T, 6, seed=2)))
    dataset = TokenDataset(shards, T, seed=2)
    assert [dataset[k]["targets"].tolist() for k in range(6)] == expected
    stream = TokenStream(shards, T, 6, seed=2)
    assert targets_of([next(iter(DataLoader(stream, batch_size=None)))]) == expected


# The tools.


def test_merging_with_plain_text(masked, plain, tmp_path):
    merged = merge([plain, masked], tmp_path / "both")
    assert problems_of(merged) == []
    parts = [Shards.open(directory) for directory in (plain, masked)]
    found = Shards.open(merged)
    assert found.trained(0, found.n_tokens).tolist() == [
        *([True] * parts[0].n_tokens),
        *parts[1].trained(0, parts[1].n_tokens).tolist(),
    ]
    assert found.n_trained_tokens == parts[0].n_tokens + parts[1].n_trained_tokens
    assert read_manifest(merged)["conversations"] == read_manifest(masked)["conversations"]
    assert Tokenizer.load(merged).chat_template == Tokenizer.load(masked).chat_template


def test_merging_two_templates_is_refused(masked, tmp_path):
    file = write_conversations(tmp_path / "chat.jsonl", conversations(9))
    template = tmp_path / "own.jinja"
    template.write_text((masked / "chat_template.jinja").read_text() + "{# other #}")
    settings: dict[str, Any] = {
        "source": "conversations",
        "paths": (str(file),),
        "chat_template": str(template),
        "tokenizer": str(masked),
    }
    other = prepare(PrepareConfig(out=str(tmp_path / "d"), **settings))
    with pytest.raises(ValueError, match="was made with another chat template than"):
        merge([masked, other], tmp_path / "both")


def test_a_difference_in_the_mask_alone_is_told(masked, tmp_path):
    settings: dict[str, Any] = {
        "tokenizer": str(masked),
        "source": "conversations",
        "val_fraction": 0.0,
        "unit_bytes": 10**6,
    }
    file = write_conversations(tmp_path / "chat.jsonl", conversations(9))
    one, two = (
        prepare(PrepareConfig(out=str(tmp_path / on), paths=(str(file),), train_on=on, **settings))
        for on in ("answers", "last")
    )
    lines = differences(one, two)
    assert any("trained tokens, then" in line for line in lines)
    assert any("the same tokens, but others are trained: the first is token" in line for line in lines)
    assert any(line.startswith("conversations.train_on: 'answers', then 'last'") for line in lines)
    assert differences(one, one) == []


def test_looking_in_shows_what_is_trained(masked, plain, capsys):
    assert inspect_main([str(masked), "--documents", "90", "--characters", "5000", "--split", "train"]) == 0
    text = capsys.readouterr().out
    shards = Shards.open(masked)
    assert f"{shards.n_trained_tokens:,}" in text
    assert text.count("<|im_start|>assistant\n⟦") == text.count("<|im_end|>⟧\n") > 100
    assert inspect_main([str(plain)]) == 0
    assert "⟦" not in capsys.readouterr().out


@pytest.mark.parametrize("format", ["nanogpt", "megatron"])
def test_formats_without_a_mask_say_so(masked, tmp_path, format):
    with pytest.raises(ValueError, match=f"has a loss mask, for which {format} has no place"):
        export_tokens(masked, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
    export_tokens(masked, tmp_path / "out", format, drop_loss_mask=True)
    assert any((tmp_path / "out").glob("*.bin"))
