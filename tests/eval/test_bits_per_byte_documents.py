"""Bits per byte of texts: equal to one forward a token, on any number of ranks, and after being stopped anywhere."""

from __future__ import annotations

import math
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_house import PARAGRAPHS, model, tokenizer

from grist_eval.bits_per_byte_documents import bits_per_byte_of_documents
from grist_eval.text_documents import TextDocument
from grist_model.config import RopeScaling

LENGTH, STRIDE = 24, 9  # several windows a document, the last one shorter


def texts(count: int = 14) -> list[TextDocument]:
    return [
        TextDocument(f"{i}. " + " ".join(PARAGRAPHS[(i + j) % 4] for j in range(i % 4)), "ab"[i % 3 == 0], f"t:{i}")
        for i in range(1, count + 1)
    ]


def measured(documents: list[TextDocument], network=None, **changes: Any) -> tuple[dict[str, Any], list[Any]]:
    found: list[Any] = []
    settings: dict[str, Any] = {"sequence_length": LENGTH, "stride": STRIDE, "batch_tokens": 60, **changes}
    result = bits_per_byte_of_documents(
        network or model(), tokenizer(), documents, done=lambda *each: found.append(each), **settings
    )
    return result, found


@torch.no_grad()
def naive(network, text: str, length: int, stride: int) -> tuple[float, int]:
    """Nats and tokens of a text: one forward a token, in float64."""
    of_text = tokenizer()
    ids = [of_text.eot_id, *of_text.encode(text)]
    network = network.double()
    nats = 0.0
    for target in range(1, len(ids)):
        window = max(0, -(-(target - length) // stride))
        before = ids[window * stride : target]
        assert 1 <= len(before) <= length
        nats -= network(torch.tensor([before]))[0, -1].log_softmax(-1)[ids[target]].item()
    network.float()
    return nats, len(ids) - 1


@pytest.mark.parametrize(("length", "stride"), [(LENGTH, STRIDE), (LENGTH, LENGTH), (LENGTH, 1), (64, 64)])
def test_every_document_is_what_a_naive_loop_says(length, stride):
    documents = texts(5)
    result, found = measured(documents, sequence_length=length, stride=stride)
    assert [document for document, _ in found] == documents
    for document, of in found:
        nats, tokens = naive(model(), document.text, length, stride)
        assert of.nats == pytest.approx(nats, rel=2e-6)
        assert (of.tokens, of.n_bytes) == (tokens, len(document.text.encode()))
    total = sum(of.n_bytes for _, of in found)
    assert result["bytes"] == total
    assert result["documents"] == 5
    assert result["bits_per_byte"] == pytest.approx(sum(of.nats for _, of in found) / math.log(2) / total, rel=1e-12)


def test_domains_share_the_documents():
    result, found = measured(texts())
    assert result["domains"].keys() == {"a", "b"}
    for name, figures in result["domains"].items():
        own = [of for document, of in found if document.domain == name]
        assert figures["documents"] == len(own)
        assert figures["tokens"] == sum(of.tokens for of in own)
        assert figures["loss"] == pytest.approx(sum(of.nats for of in own) / figures["tokens"], rel=1e-12)
    assert result["bits_per_byte_low"] < result["bits_per_byte"] < result["bits_per_byte_high"]


@pytest.mark.parametrize("batch_tokens", [1, 37, 10_000])
def test_what_is_in_a_stream_does_not_matter(batch_tokens):
    expected, _ = measured(texts())
    found, _ = measured(texts(), batch_tokens=batch_tokens)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["tokens"] == expected["tokens"]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 7])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path, monkeypatch, after):
    expected = measured(texts())
    network, forwards = model(), 0
    hidden = network.hidden

    def counting(*given, **named):
        nonlocal forwards
        forwards += 1
        if forwards > after * 4:  # streams between two visits to the cache
            raise Stopped
        return hidden(*given, **named)

    monkeypatch.setattr(network, "hidden", counting)
    kept: dict[str, Any] = {"cache": tmp_path, "model_key": "k" * 64}
    with pytest.raises(Stopped):
        measured(texts(), network, **kept)
    file = next(tmp_path.iterdir())
    with file.open("ab") as torn:
        torn.write(b'{"row": "half a li')
    known = len(file.read_bytes().split(b"\n")) - 1
    assert 0 < known < len(texts())
    forwards = -(10**6)
    begun = forwards
    assert measured(texts(), network, **kept) == expected
    again = forwards - begun
    assert len(file.read_bytes().splitlines()) == len(texts())
    forwards = begun
    assert measured(texts(), network, **kept) == expected
    assert forwards == begun  # all is known
    measured(texts(), network)
    assert again < forwards - begun


def test_another_model_window_or_text_is_not_known(tmp_path):
    measured(texts(2), cache=tmp_path, model_key="k" * 64)
    other = model(rope_theta=500.0)
    expected = measured(texts(2), other)
    assert measured(texts(2), other, cache=tmp_path, model_key="o" * 64) == expected
    assert measured(texts(2), cache=tmp_path, model_key="k" * 64, stride=4) == measured(texts(2), stride=4)


def test_bad_input_is_told():
    with pytest.raises(ValueError, match=r"stride must lie in 1 to sequence_length \(24\), but is 25"):
        measured(texts(), stride=25)
    with pytest.raises(ValueError, match="batch_tokens must be at least 1"):
        measured(texts(), batch_tokens=0)
    with pytest.raises(ValueError, match="a cache needs model_key"):
        measured(texts(), cache="somewhere")
    with pytest.raises(ValueError, match="no documents"):
        measured([])
    with pytest.raises(ValueError, match="t:1: the tokenizer makes no token"):
        measured([TextDocument("", "a", "t:1")])
    with pytest.raises(ValueError, match=r"t:1: id \d+ is outside the model's vocabulary of 300"):
        measured(texts(2), model(vocab_size=300))


def test_angles_that_depend_on_the_stream_are_refused():
    scaled = model(rope_scaling=RopeScaling("dynamic", 2.0, original_context=16))
    with pytest.raises(ValueError, match="original context of 16"):
        measured(texts(2), scaled)
    assert measured(texts(2), scaled, sequence_length=16, stride=8)[0]["documents"] == 2


def _on_a_rank(rank: int, world_size: int, port: int, cache: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    kept: dict[str, Any] = {"cache": cache, "model_key": "k" * 64}
    results[rank] = measured(texts(), rank=rank, world_size=world_size, **kept)
    dist.destroy_process_group()


def test_two_ranks_find_the_same_bits_and_share_one_cache(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_on_a_rank, (2, port, str(tmp_path), results), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
        found = dict(results)
    torch.set_num_threads(1)
    expected = measured(texts())
    assert found[0] == found[1] == expected
    assert measured(texts(), cache=tmp_path, model_key="k" * 64) == expected
    assert len(list(tmp_path.iterdir())) == 1
