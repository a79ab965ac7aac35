"""Copies to CUDA beside what it computes: order of copies, events and reads, on a device that finishes as late as it may."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from splits_in_memory import split_in_memory

from grist_data import Batches, side_stream
from grist_data.side_stream import RING, SideStream
from grist_data.supply import Supply

A = split_in_memory("id-a", [1001, 333, 700], dtype="<u2")


class LateDevice:
    """A stream whose work is done only when somebody waits for an event behind it; torch.cuda as `SideStream` uses it."""

    def __init__(self):
        self.queue: list = []
        self.done = 0
        self.waited: list[int] = []  # by the consumer's stream
        self.recorded: list[torch.Tensor] = []
        self.current: list = []
        self.Event = lambda: _Event(self)
        self.Stream = lambda device: "side"
        self.wait_event = lambda event: self.waited.append(event.after) or self.finish(event.after)

    def add(self, work) -> None:
        assert self.current == ["side"], "begun on the consumer's stream"
        self.queue.append(work)

    def finish(self, up_to: int) -> None:
        while self.done < up_to:
            self.queue[self.done]()
            self.done += 1

    def current_device(self) -> int:
        return 0

    def current_stream(self, device):
        return self

    @contextlib.contextmanager
    def device(self, device):
        yield

    @contextlib.contextmanager
    def stream(self, stream):
        self.current.append(stream)
        yield
        self.current.pop()


class _Event:
    def __init__(self, device: LateDevice):
        self._device, self.after = device, 0

    def record(self, stream):
        assert stream == "side"
        self.after = len(self._device.queue)

    def synchronize(self):
        self._device.finish(self.after)


@pytest.fixture
def late(monkeypatch) -> LateDevice:
    device = LateDevice()
    monkeypatch.setattr(side_stream.torch, "cuda", device)
    monkeypatch.setattr(side_stream, "_pinned", lambda n, dtype: torch.empty(n, dtype=dtype))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: device.recorded.append(self))
    return device


def sender(late: LateDevice, token_bytes: int = 2) -> SideStream:
    """A SideStream whose copies read their buffer when the device comes to them, not when they are asked for."""
    side = SideStream(torch.device("cuda"), 12, np.dtype(f"<u{token_bytes}"))
    assert side.device == torch.device("cuda", 0), "a thread of its own would begin on another device"
    side.device = torch.device("cpu")
    return side


class _Buffer(torch.Tensor):
    """Copied by `to` as late as the device likes."""

    late: LateDevice

    def to(self, device, non_blocking=False):  # type: ignore[override]
        assert non_blocking
        out = torch.empty(self.shape, dtype=self.dtype)
        source = self.as_subclass(torch.Tensor)
        self.late.add(lambda: out.copy_(source))
        return out


@pytest.fixture
def late_copies(late, monkeypatch):
    monkeypatch.setattr(_Buffer, "late", late, raising=False)
    monkeypatch.setattr(side_stream, "_pinned", lambda n, dtype: torch.empty(n, dtype=dtype).as_subclass(_Buffer))
    return late


def test_no_buffer_is_written_before_its_copy_is_finished(late_copies):
    side = sender(late_copies)
    sent = []
    for number in range(5 * RING):
        with side.sending((2, 3)) as (buffer, send):
            buffer[:] = number
            sent.append((send(), side.ready()))
    assert late_copies.done < len(late_copies.queue), "the host waits for old copies alone"
    for number, (rows, ready) in enumerate(sent):
        side.hand_over([rows], ready)
        assert (rows == number).all()


def test_the_consumer_waits_for_all_that_was_begun(late_copies):
    side = sender(late_copies)
    with side.sending((2, 3)) as (buffer, send):
        buffer[:] = 7
        rows = send()
        wide = torch.zeros(2, 3, dtype=torch.int64)
        late_copies.add(lambda: wide.copy_(rows))
        ready = side.ready()
    assert not wide.any()
    side.hand_over([wide], ready)
    assert (wide == 7).all()
    assert late_copies.waited == [2]
    assert [id(tensor) for tensor in late_copies.recorded] == [id(wide)]


@pytest.mark.parametrize(("token_bytes", "largest"), [(2, 65_535), (4, 2**31 - 1)])
def test_ids_keep_their_value(late, token_bytes, largest):
    side = sender(late, token_bytes)
    with side.sending((1, 2)) as (buffer, send):
        buffer[:] = 1, largest
        assert send().to(torch.int64).tolist() == [[1, largest]]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_by_way_of_the_side_stream_are_those_of_the_cpu(late, monkeypatch, prefetch):
    """All that happens on CUDA, with a CPU in its place: widening, masks, borders, and who may read what."""
    options = {"seed": 3, "micro_batch_size": 3, "documents": True, "ignore_next_document": True}
    plain, other = Batches(A, 8, 6, **options), Batches(A, 8, 6, **options, prefetch=prefetch)
    supply = Supply(other.order, torch.device("cuda"), True, True, 6 * 9)
    assert supply._side is not None
    supply._side.device = torch.device("cpu")
    monkeypatch.setattr(other, "_supply", supply)
    for _ in range(3 * RING):
        late.recorded.clear()
        for ours, theirs in zip(next(other), next(plain), strict=True):
            assert all(a.equal(b) for a, b in zip(ours.tensors(), theirs.tensors(), strict=True))
            assert (ours.n_valid_tokens, ours.max_seqlen) == (theirs.n_valid_tokens, theirs.max_seqlen)
        assert len(late.recorded) == 2 * 3, "ids, targets and borders of two micro-batches"
    other.close()


def test_a_thread_is_the_default_on_cuda_alone(late):
    assert Batches(A, 8, 6, seed=0)._prefetch == 0
    assert Batches(A, 8, 6, seed=0, device="cuda")._prefetch == 2
    assert Batches(A, 8, 6, seed=0, device="cuda", prefetch=0)._prefetch == 0
