"""Held-out loss: equal to a naive loop, whatever the windows, batches and number of processes."""

from __future__ import annotations

import itertools
import math
import socket
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_house import model, tokenizer
from torch.distributed.tensor import DTensor

from grist_data import Shards, Tokenizer
from grist_eval import bits_per_byte as exported
from grist_eval.bits_per_byte import LOGITS_BUDGET_BYTES, bits_per_byte, spelled_bytes

T = 48  # not the model's context, and not a divisor of the split


def naive(network, ids: list[int], length: int, stride: int) -> float:
    """Nats of every token after the first: one window after the other, one position after the other, in float64."""
    network = network.double()
    nats, scored, start = 0.0, 1, 0  # of the ids, the first `scored` are done
    while scored < len(ids):
        window = ids[start : start + length + 1]
        log_p = network(torch.tensor([window[:-1]])).double().log_softmax(-1)[0]
        for position in range(1, len(window)):
            if start + position >= scored:
                nats -= log_p[position - 1, window[position]].item()
        scored = start + len(window)
        start += stride
    network.float()
    return nats


@pytest.fixture(scope="module")
def held_out(dataset_directory):
    return Shards.open(dataset_directory, split="val")


@pytest.fixture(scope="module")
def ids(held_out) -> list[int]:
    return held_out.read(0, held_out.n_tokens).tolist()


@pytest.mark.parametrize("stride", [T, 17, 1])
def test_it_is_what_a_naive_loop_says(held_out, ids, stride):
    if stride == 1:
        ids = ids[:200]
    network = model()
    found = bits_per_byte(
        network,
        held_out,
        sequence_length=T,
        stride=stride,
        batch_size=5,
        max_tokens=199 if stride == 1 else None,
    )
    nats = naive(network, ids, T, stride)
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
    if stride != 1:
        assert found["bytes"] == held_out.n_bytes
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / held_out.n_bytes, rel=1e-6)


def test_logits_are_capped_where_the_model_caps_them(held_out, ids):
    network = model(logit_softcap=0.3)
    found = bits_per_byte(network, held_out, sequence_length=T, max_tokens=199)
    assert found["loss"] == pytest.approx(naive(network, ids[:200], T, T) / 199, rel=1e-6)


def test_more_context_is_worth_something_to_a_model_that_uses_it(held_out):
    """Overlapping windows score the same tokens; the result is another, and neither batch size nor chunks change it."""
    network = model()
    plain = bits_per_byte(network, held_out, sequence_length=T)
    overlapping = bits_per_byte(network, held_out, sequence_length=T, stride=8)
    assert overlapping["tokens"] == plain["tokens"]
    assert overlapping["bits_per_byte"] != pytest.approx(plain["bits_per_byte"], rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_does_not_matter(held_out, batch_size):
    network = model()
    expected = bits_per_byte(network, held_out, sequence_length=T)
    assert bits_per_byte(network, held_out, sequence_length=T, batch_size=batch_size) == pytest.approx(
        expected, rel=1e-6
    )


def test_logits_are_made_in_chunks(held_out, monkeypatch):
    network = model()
    expected = bits_per_byte(network, held_out, sequence_length=T)
    rows = []
    linear = torch.nn.functional.linear

    def listening(x, weight, bias=None):
        if weight.shape == network.unembedding.shape:
            rows.append(x.shape[0])
        return linear(x, weight, bias)

    # Through sys.modules: in the package the module's name is the function's.
    monkeypatch.setattr(sys.modules["grist_eval.bits_per_byte"], "LOGITS_BUDGET_BYTES", 4 * 320 * 10)
    monkeypatch.setattr(torch.nn.functional, "linear", listening)
    assert bits_per_byte(network, held_out, sequence_length=T) == pytest.approx(expected, rel=1e-6)
    assert max(rows) == 10
    assert sum(rows) == expected["tokens"]
    assert LOGITS_BUDGET_BYTES >= 4 * 201_088  # at least one row of the largest vocabulary


def test_the_context_is_the_default_window(held_out):
    network = model(context_length=32)
    assert bits_per_byte(network, held_out) == bits_per_byte(network, held_out, sequence_length=32)


def test_tokens_spell_exactly_the_bytes_of_the_text(held_out, ids):
    of_text = tokenizer()
    count_V = torch.bincount(torch.tensor(ids), minlength=of_text.vocab_size)
    assert count_V[of_text.eot_id] > 1
    assert spelled_bytes(count_V, of_text) == held_out.n_bytes


def test_a_part_has_exactly_the_bytes_of_its_tokens(held_out, ids):
    of_text = tokenizer()
    found = bits_per_byte(model(), held_out, sequence_length=T, max_tokens=100)
    text = of_text.token_bytes([i for i in ids[1:101] if i != of_text.eot_id])
    assert found["tokens"] == 100
    assert found["bytes"] == len(text)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * 100 / math.log(2) / len(text))
    assert found == bits_per_byte(model(), held_out, sequence_length=T, max_tokens=100, tokenizer=of_text)


def test_a_part_that_is_the_whole_is_the_whole(held_out):
    whole = bits_per_byte(model(), held_out, sequence_length=T)
    assert bits_per_byte(model(), held_out, sequence_length=T, max_tokens=10**9) == whole


def test_without_a_byte_level_tokenizer_a_part_has_the_average(held_out, monkeypatch):
    def refuse(self, ids):
        raise ValueError("token bytes are defined for byte-level tokenizers")

    monkeypatch.setattr(Tokenizer, "token_bytes", refuse)
    found = bits_per_byte(model(), held_out, sequence_length=T, max_tokens=100)
    assert found["bytes"] == round(held_out.n_bytes * 100 / held_out.n_tokens)


def test_the_mode_of_the_model_is_as_before(held_out):
    network = model()
    for training in (True, False):
        network.train(training)
        bits_per_byte(network, held_out, sequence_length=T, max_tokens=10)
        assert network.training is training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_bfloat16_is_close_and_its_sums_are_not_bfloat16(held_out):
    whole = bits_per_byte(model(), held_out, sequence_length=T)
    half = bits_per_byte(model().bfloat16(), held_out, sequence_length=T)
    assert half["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=2e-2)


def test_bad_input_is_told(held_out):
    with pytest.raises(ValueError, match="vocabulary of 320 tokens but the model one of 300"):
        bits_per_byte(model(vocab_size=300), held_out)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        bits_per_byte(model(), held_out, max_tokens=0)
    nearly_empty = SimpleNamespace(n_tokens=1, vocab_size=320)
    with pytest.raises(ValueError, match=r"the split holds 1 token\(s\)"):
        bits_per_byte(model(), nearly_empty)  # pyright: ignore[reportArgumentType]


def test_the_package_exports_the_function():
    assert exported is bits_per_byte


def _ranks_in_turn(monkeypatch, world_size: int, run: Callable[[int], Any]) -> Any:
    """What the last of some ranks returns that run one after the other, each told what those before it gave."""
    given: list[Any] = []

    def gather(found, value, group=None):
        given.append(value)
        found[: len(given)] = given
        found[len(given) :] = [[]] * (world_size - len(given))

    monkeypatch.setattr(dist, "all_gather_object", gather)
    return [run(rank) for rank in range(world_size)][-1]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("max_tokens", [None, 1200])
def test_ranks_share_the_tokens_and_find_the_same_bits(held_out, monkeypatch, world_size, max_tokens):
    """The split's windows do not divide evenly, so some ranks run rows in which nothing is scored."""
    common: dict[str, Any] = {"sequence_length": T, "batch_size": 4, "max_tokens": max_tokens, "stride": 20}
    whole = bits_per_byte(model(), held_out, **common)
    assert whole == _ranks_in_turn(
        monkeypatch,
        world_size,
        lambda rank: bits_per_byte(model(), held_out, rank=rank, world_size=world_size, **common),
    )


def _naive_documents(network, ids: list[int], ends: list[int], of_text) -> tuple[list[float], list[int]]:
    """Nats and bytes of each document, in windows of T."""
    starts = [0, *ends[:-1]]
    upto = [0.0, *(naive(network, ids[:end], T, T) for end in ends)]
    texts = [[i for i in ids[start:end] if i != of_text.eot_id] for start, end in zip(starts, ends, strict=True)]
    return [b - a for a, b in itertools.pairwise(upto)], [len(of_text.token_bytes(text)) for text in texts]


def test_the_interval_is_the_bootstrap_over_documents(held_out, ids):
    ends = [at + 1 for at, i in enumerate(ids) if i == held_out.eot_id]
    assert len(ends) == held_out.n_docs > 5
    nats, n_bytes = _naive_documents(model(), ids, ends, tokenizer())
    found = bits_per_byte(model(), held_out, sequence_length=T, batch_size=3)
    assert sum(n_bytes) == held_out.n_bytes
    draw = np.random.default_rng(0)
    drawn = []
    for _ in range(1000):
        at = draw.integers(len(nats), size=len(nats))
        drawn.append(sum(nats[i] for i in at) / math.log(2) / sum(n_bytes[i] for i in at))
    assert found["documents"] == held_out.n_docs
    assert found["bits_per_byte_stderr"] == pytest.approx(np.std(drawn, ddof=1), rel=1e-5)
    assert found["bits_per_byte_low"] == pytest.approx(np.percentile(drawn, 2.5), rel=1e-6)
    assert found["bits_per_byte_high"] == pytest.approx(np.percentile(drawn, 97.5), rel=1e-6)
    assert found["bits_per_byte_low"] < found["bits_per_byte"] < found["bits_per_byte_high"]


def test_a_part_is_of_the_documents_in_it(held_out, ids):
    first = ids.index(held_out.eot_id)
    one = bits_per_byte(model(), held_out, sequence_length=T, max_tokens=first)
    assert one["documents"] == 1
    assert "bits_per_byte_low" not in one
    assert bits_per_byte(model(), held_out, sequence_length=T, max_tokens=first + 1)["documents"] == 2


def _on_a_rank(rank: int, world_size: int, port: int, directory: str, results) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    held_out = Shards.open(directory, split="val")
    sharded = model()
    mesh = init_device_mesh("cpu", (world_size,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(sharded, "hidden")
    common: dict[str, Any] = {"sequence_length": T, "batch_size": 4, "rank": rank, "world_size": world_size}
    first = bits_per_byte(sharded, held_out, **common)
    still_sharded = all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    results[rank] = (first, bits_per_byte(sharded, held_out, **common, max_tokens=150), still_sharded)
    dist.destroy_process_group()


def test_a_sharded_model_gives_the_same_and_stays_sharded(dataset_directory, held_out):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_on_a_rank, (2, port, str(dataset_directory), results), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
        found = dict(results)
    whole = bits_per_byte(model(), held_out, sequence_length=T)
    part = bits_per_byte(model(), held_out, sequence_length=T, max_tokens=150)
    for rank in range(2):
        sharded, sharded_part, still_sharded = found[rank]
        assert sharded == pytest.approx(whole, rel=1e-6)
        assert sharded_part == pytest.approx(part, rel=1e-6)
        assert still_sharded


def test_documents_may_be_kept_apart(held_out, ids):
    """With `documents`, a token is predicted from its own document alone, as a model trained with masks expects."""
    apart = bits_per_byte(model(), held_out, sequence_length=T, documents=True)
    together = bits_per_byte(model(), held_out, sequence_length=T)
    assert apart["tokens"] == together["tokens"]
    assert apart["loss"] != pytest.approx(together["loss"], rel=1e-5)
    first_document = ids[: ids.index(held_out.eot_id) + 1][:T]
    alone = naive(model(), first_document, T, T)
    found = bits_per_byte(model(), held_out, sequence_length=T, documents=True, max_tokens=len(first_document) - 1)
    assert found["loss"] * found["tokens"] == pytest.approx(alone, rel=1e-6)
