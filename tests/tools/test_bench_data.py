"""The benchmark of the data path: what is wrong is found and not timed, rates are what they say, results are written down."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from text_corpus import corpus_texts, write_jsonl

from grist_data import Batches, Shards, Tokenizer
from grist_data import batch as batch_module
from grist_data.tokenizer_training import train_bpe
from grist_data.verify import problems_of
from grist_tools import bench_data_peers, bench_data_report, bench_data_start, bench_kernels
from grist_tools.bench_data import main
from grist_tools.bench_data_peers import copy_limit, peers
from grist_tools.bench_data_report import results_table
from grist_tools.bench_data_sets import document_ends, ends_in_file, make_dataset, repeated, texts_of, tokens_in_file
from grist_tools.bench_data_start import cold_row, own_memory_row, start_rows
from grist_tools.bench_data_supply import Sizes, mixed, plain, with_documents
from grist_tools.bench_data_text import text_rows
from grist_tools.bench_data_turns import Contestant, Slice, judged, race, rates
from grist_tools.bench_kernels import default_out

SIZES = Sizes(batch=3, time=17)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(corpus_texts(), 300)


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("data")
    return [make_dataset(folder / f"set{seed}", tokenizer, 20_001, seed) for seed in range(3)]


@pytest.fixture
def splits(directories):
    return {directory.name: Shards.open(directory) for directory in directories}


def shifted_by_one(monkeypatch):
    """Every row that is not the first of the file begins one token too early."""
    gather = Shards.gather
    monkeypatch.setattr(Shards, "gather", lambda self, offsets, out: gather(self, np.maximum(offsets - 1, 0), out))


def problem_of(contestant: Contestant) -> str:
    return contestant.problem() or "nothing is wrong"


def test_a_dataset_is_whole_and_made_of_random_ids(directories, tokenizer):
    assert problems_of(directories[0]) == []
    split = Shards.open(directories[0])
    ids = split.read(0, split.n_tokens)
    assert (len(ids), split.tokenizer_sha256) == (20_001, tokenizer.sha256)
    assert set(ids.tolist()) == set(range(tokenizer.vocab_size))
    assert Shards.open(directories[1]).dataset_id != split.dataset_id
    assert np.array_equal(tokens_in_file(split, 19_990, 11), ids[-11:])
    assert np.array_equal(ends_in_file(split), split.shards[0].doc_ends)
    with pytest.raises(IndexError, match="token 20001 is behind the end"):
        tokens_in_file(split, 20_001, 1)


def test_documents_have_the_lengths_that_are_promised():
    lengths = np.diff(document_ends(20_000_000, np.random.default_rng(0)), prepend=0)
    assert lengths.min() >= 1
    assert lengths.sum() == 20_000_000
    assert np.median(lengths) == pytest.approx(1222, rel=0.1)
    assert lengths.mean() == pytest.approx(3607, rel=0.15)


def test_rates_are_tokens_over_time():
    found = rates([Slice([0.25, 0.25], 0.25), Slice([1.0], 0.5), Slice([0.125] * 4, 0.5)], tokens=100)
    assert (found["lowest"], found["value"], found["highest"]) == (100, 400, 800)
    assert found["per_cpu_second"] == 800
    assert (found["batches"], found["p50_ms"]) == (7, 125)
    assert 250 < found["p99_ms"] < 1000


def test_a_value_is_judged_by_its_target():
    row = {"ok": True, "value": 5.0}
    assert judged(row, 5.0)["reached"]
    assert not judged(row, 5.1)["reached"]
    assert judged(row, 5.1, "lower")["reached"]
    assert "reached" not in judged({"ok": True, "value": None}, 1.0)
    assert "reached" not in judged({"ok": False, "wrong": "x"}, 1.0)


def test_what_is_wrong_is_not_timed():
    drawn = []

    def never():
        raise AssertionError("timed although wrong")

    found = race(
        {
            "right": Contestant(10, lambda: drawn.append(1), lambda: None),
            "wrong": Contestant(10, never, lambda: "row 3 differs"),
        },
        seconds=0.001,
        rounds=3,
    )
    assert found["wrong"] == {"ok": False, "wrong": "row 3 differs"}
    assert found["right"]["ok"]
    assert len(drawn) > found["right"]["batches"] >= 60  # the first slice warms up


@pytest.mark.parametrize("make", [plain, with_documents])
def test_our_rows_are_compared_with_the_file(make, splits, monkeypatch):
    for sizes in (SIZES, Sizes(batch=4, time=500)):
        assert make(splits["set0"], sizes).problem() is None
    shifted_by_one(monkeypatch)
    assert "x of row 0 is not what the file has" in problem_of(make(splits["set0"], SIZES))


def test_document_borders_are_compared_with_the_file(splits, monkeypatch):
    cu_seqlens_of = batch_module.cu_seqlens_of
    monkeypatch.setattr(batch_module, "cu_seqlens_of", lambda ends, B, T: cu_seqlens_of([e + 1 for e in ends], B, T))
    assert "but cu_seqlens is" in problem_of(with_documents(splits["set0"], Sizes(batch=4, time=500)))


def test_a_mixture_is_compared_with_files_and_weights(splits, monkeypatch):
    contestant = mixed(splits, SIZES)
    assert contestant.problem() is None
    batches = contestant.draw()
    assert batches[0].ids_BT.shape == (SIZES.batch, SIZES.time)
    shifted_by_one(monkeypatch)
    assert "is not what the file has" in problem_of(contestant)
    monkeypatch.undo()
    samples = type(Batches(splits["set0"], 17, 3, seed=0).order).samples
    monkeypatch.setattr(
        "grist_data.stages.StagedOrder.samples",
        lambda self, positions: samples(self, positions)._replace(source=np.zeros(len(positions), np.int64)),
    )
    assert "with a weight of" in problem_of(contestant)


def test_peers_give_what_the_file_has_or_are_found_wrong(splits, monkeypatch):
    for contestant in [*peers(splits["set0"], SIZES).values(), copy_limit(SIZES)]:
        assert contestant.problem() is None
    mapped = bench_data_peers._mapped
    monkeypatch.setattr(bench_data_peers, "_mapped", lambda split: mapped(split)[1:])
    for contestant in peers(splits["set0"], SIZES).values():
        assert "is not what the file has" in problem_of(contestant)


def test_starts_are_timed_when_the_right_batch_comes(directories, monkeypatch):
    found = start_rows(directories[0], SIZES, rounds=1)
    assert {name: row["ok"] for name, row in found.items()} == {"open": True, "resume": True}
    assert all(row["value"] > 0 for row in found.values())
    monkeypatch.setattr(Batches, "load_state_dict", lambda self, state: None)
    found = start_rows(directories[0], SIZES, rounds=1)
    assert "is not the one that follows" in found["resume"]["wrong"]


def test_memory_is_that_of_a_fresh_process(directories):
    """Some buffers and a block of offsets; far below what torch itself takes."""
    assert 0 < own_memory_row(directories[0], SIZES)["value"] < 50e6


def test_a_cache_that_was_not_dropped_gives_no_rate(directories, monkeypatch):
    monkeypatch.setattr(bench_data_start, "_number_in", lambda file, key: 7)
    found = cold_row(directories[0], SIZES, 0.001, rounds=1)
    assert found["ok"]
    assert found["value"] is None
    assert "nothing was read from a disk" in found["why"] or not hasattr(os, "posix_fadvise")
    assert "nothing was read" in results_table([{"what": "supply, cold", "who": "grist_data", **found}])


def test_cold_rows_are_compared_with_the_file(directories, monkeypatch):
    counted = iter(range(0, 10**9, 4096))
    monkeypatch.setattr(bench_data_start, "_number_in", lambda file, key: next(counted))
    found = cold_row(directories[0], SIZES, 0.001, rounds=1)
    assert found["value"] > 0
    assert found["bytes_read_over_wanted"] > 0
    shifted_by_one(monkeypatch)
    assert "step 0" in cold_row(directories[0], SIZES, 0.001, rounds=1)["wrong"]


def test_text_is_timed_when_the_ids_agree(tmp_path, tokenizer, monkeypatch):
    texts = repeated([*corpus_texts(), "<|endoftext|> in a text is text"], 20_000)
    found = text_rows(texts, tokenizer, tmp_path / "right", rounds=1)
    ours, alone = found["grist_data.prepare"], found["tokenizers alone"]
    assert ours["target"] == 0.9 * alone["value"]
    assert ours["text_bytes"] == sum(len(text.encode()) for text in texts) >= 20_000
    encode_batch = Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda self, texts: [ids[::-1].copy() for ids in encode_batch(self, texts)]
    )
    found = text_rows(texts, tokenizer, tmp_path / "wrong", rounds=1)
    assert list(found) == ["grist_data.prepare"]
    assert "is not the one that tokenizers gives" in found["grist_data.prepare"]["wrong"]


def test_texts_come_from_files(tmp_path):
    assert texts_of([str(write_jsonl(tmp_path / "a.jsonl", ["one", " ", "two"]))]) == ["one", "two"]
    with pytest.raises(ValueError, match="no text in it"):
        texts_of([str(write_jsonl(tmp_path / "b.jsonl", [" "]))])


def test_results_are_named_by_device_and_day_and_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_kernels, "__file__", str(tmp_path / "tools" / "grist_tools" / "bench_kernels.py"))
    (tmp_path / "benchmarks").mkdir()
    first = default_out("Processor (TM) 7", "2030-01-02", "data")
    assert first == tmp_path / "benchmarks" / "data-processor-tm-7-2030-01-02.json"
    first.touch()
    assert default_out("Processor (TM) 7", "2030-01-02", "data").name == "data-processor-tm-7-2030-01-02-2.json"


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Options of a run of a second, which writes into tmp_path; nothing in it starts another process."""
    monkeypatch.setattr(
        bench_data_start,
        "own_memory_row",
        lambda directory, sizes: {"ok": True, "unit": "bytes", "value": 10**6},
    )
    monkeypatch.setattr(bench_data_report, "commit", lambda: "of today")
    (tmp_path / "made").mkdir()
    texts = write_jsonl(tmp_path / "texts.jsonl", corpus_texts())
    return [
        *("--text", str(texts), "--text-mb", "0.01", "--vocab-size", "300", "--tokens", "60000"),
        *("--sequence-length", "17", "--batch", "3", "--seconds", "0.01", "--rounds", "2"),
        *("--folder", str(tmp_path / "made"), "--out", str(tmp_path / "data.json")),
    ]


def report_in(tmp_path):
    return json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))


def test_command_line_checks_times_and_writes(tmp_path, quick, capsys):
    assert main([*quick, "--peers"]) == 0
    report = report_in(tmp_path)
    assert report["complete"]
    assert {"what", "command", "commit", "device", "versions", "date", "threads", "how", "dataset"} <= report.keys()
    assert (report["dataset"]["tokens"], report["sequence_length"], report["batch"]) == (60000, 17, 3)
    assert [(row["what"], row["who"]) for row in report["rows"]] == [
        ("supply", "grist_data"),
        ("supply, documents", "grist_data"),
        ("supply, mixture of three", "grist_data"),
        ("supply", "copy of the bytes"),
        ("supply", "nanoGPT's way, memmap kept open"),
        ("supply", "torch DataLoader, blocks"),
        ("own memory", "grist_data"),
        ("open", "grist_data"),
        ("resume", "grist_data"),
        ("supply, cold", "grist_data"),
        ("text to shards", "grist_data.prepare"),
        ("text to shards", "tokenizers alone"),
        ("text to shards", "tiktoken alone"),
        ("text to shards", "grist_data engine tokenizers"),
        ("text to shards", "grist_data engine tiktoken"),
        ("text to shards", "grist_data.prepare, tiktoken"),
        ("text to shards", "grist_data engine gigatoken"),
        ("text to shards", "grist_data.prepare, gigatoken"),
    ]
    judged_rows = {row["what"] for row in report["rows"] if "target" in row}
    assert len(judged_rows) == 7
    assert "supply, mixture of three" not in judged_rows
    assert "torch DataLoader, blocks" in capsys.readouterr().out
    assert list((tmp_path / "made").iterdir()) == []


def test_what_is_wrong_fails_the_command(tmp_path, quick, monkeypatch, capsys):
    shifted_by_one(monkeypatch)
    assert main(quick) == 1
    wrong = {row["what"] for row in report_in(tmp_path)["rows"] if not row["ok"]}
    assert {"supply", "supply, documents", "supply, mixture of three", "resume"} <= wrong
    assert "WRONG" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_done_and_leaves_a_dataset_of_ones_own_alone(
    tmp_path, quick, directories, monkeypatch, capsys
):
    def stop(*arguments):
        raise KeyboardInterrupt

    before = {path: path.stat().st_mtime_ns for path in directories[0].iterdir()}
    monkeypatch.setattr(bench_data_start, "own_memory_row", stop)
    assert main([*quick, "--dataset", str(directories[0])]) == 130
    report = report_in(tmp_path)
    assert not report["complete"]
    assert report["dataset"]["dataset_id"] == Shards.open(directories[0]).dataset_id
    assert len(report["rows"]) == 4
    assert all(row["ok"] for row in report["rows"])
    assert "stopped after 4 rows" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in directories[0].iterdir()} == before
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize(
    "options", [["--tokens", "800"], ["--batch", "0"], ["--dataset", "nowhere"], ["--text", "nothing.txt"]]
)
def test_bad_input_is_told(tmp_path, quick, options, capsys):
    assert main([*quick, *options]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("bench_data: ")
    assert not (tmp_path / "data.json").exists()
    assert list((tmp_path / "made").iterdir()) == []
