"""The thread that makes batches ahead: the same batches, a state that does not run ahead, errors, and an end in every way."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from splits_in_memory import split_in_memory

from grist_data import Batches, Shards
from grist_data.run_ahead import RunAhead

A = split_in_memory("id-a", [1001, 333, 700])


def feed(prefetch: int, **options) -> Batches:
    return Batches(A, 8, 6, seed=3, micro_batch_size=3, documents=True, prefetch=prefetch, **options)


def rows(batches: Batches) -> list[torch.Tensor]:
    return [tensor for batch in next(batches) for tensor in batch.tensors()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gristmill-batches"]


def wait_for(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it should have happened long ago"
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert not threads()
    yield
    gc.collect()
    assert not threads()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_batches_and_states_are_those_without_a_thread(depth):
    plain, ahead = feed(0), feed(depth)
    for _ in range(150):  # over the edge of an epoch
        assert same(rows(plain), rows(ahead))
        assert ahead.state_dict() == plain.state_dict()
        assert ahead.epoch == plain.epoch
    ahead.close()


def test_a_state_is_that_of_the_last_step_handed_out(monkeypatch):
    ahead = feed(3)
    made = []
    gather = Shards.gather
    monkeypatch.setattr(Shards, "gather", lambda self, *args: (made.append(1), gather(self, *args)))
    rows(ahead)
    wait_for(lambda: len(made) == 1 + 3)
    time.sleep(0.02)
    assert len(made) == 1 + 3, "no more than asked for"
    state = ahead.state_dict()
    assert state["pos"] == 6
    following = rows(ahead)
    resumed = feed(2)
    resumed.load_state_dict(state)
    assert same(rows(resumed), following)
    resumed.load_state_dict(state)  # with a thread under way
    assert same(rows(resumed), following)


def test_closing_ends_the_thread_and_reading_goes_on():
    plain, ahead = feed(0), feed(2)
    for _ in range(3):
        assert same(rows(plain), rows(ahead))
        assert len(threads()) == 1
        ahead.close()
        assert not threads()
        ahead.close()
    plain.skip(4)
    ahead.skip(4)
    assert same(rows(plain), rows(ahead))
    assert ahead.state_dict()["pos"] == 8 * 6


def test_any_positions_can_be_read_meanwhile():
    plain, ahead = feed(0), feed(2)
    expected = [rows(plain) for _ in range(3)]
    assert same(rows(ahead), expected[0])
    assert ahead.at(torch.arange(6, 9).numpy()).ids_BT.equal(expected[1][0])
    assert same(rows(ahead), expected[1])


def test_an_error_comes_in_its_turn_and_the_step_can_be_tried_again(monkeypatch):
    plain, ahead = feed(0), feed(4)
    gather, calls = Shards.gather, itertools.count()

    def failing(self, offsets, out):
        if next(calls) == 3:
            raise OSError("the disk is gone")
        gather(self, offsets, out)

    monkeypatch.setattr(Shards, "gather", failing)
    got = [rows(ahead) for _ in range(3)]
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    assert ahead.state_dict()["pos"] == 3 * 6
    got += [rows(ahead) for _ in range(3)]
    monkeypatch.undo()
    assert all(same(rows(plain), one) for one in got)


def test_an_error_stays_where_it_lasts():
    def failing():
        raise ValueError("always")

    ahead = RunAhead(failing, 2)
    for _ in range(3):
        with pytest.raises(ValueError, match="always"):
            ahead.take()
    ahead.stop()


def test_a_slow_consumer_and_a_slow_producer():
    numbers = itertools.count()

    def slow():
        time.sleep(0.002)
        return next(numbers)

    ahead = RunAhead(slow, 2)
    assert [ahead.take() for _ in range(5)] == list(range(5))
    time.sleep(0.05)
    assert [ahead.take() for _ in range(5)] == list(range(5, 10))
    ahead.stop()
    ahead.stop()


def test_garbage_takes_its_thread_along():
    ahead = feed(2)
    rows(ahead)
    assert len(threads()) == 1
    del ahead
    gc.collect()
    assert not threads()


def test_garbage_collected_in_the_thread_itself():
    """The collector runs in whatever thread allocates; stopping must not wait for itself."""
    began, holder, stopped = threading.Event(), [], []

    def make():
        began.wait(10)
        holder.pop().stop()
        stopped.append(True)

    holder.append(RunAhead(make, 1))
    began.set()
    wait_for(lambda: not threads())
    assert stopped == [True]


def test_a_process_ends_with_its_thread_under_way():
    code = """
        import torch
        from splits_in_memory import split_in_memory
        from grist_data import Batches
        batches = Batches(split_in_memory("a", [1001]), 8, 4, seed=0, prefetch=2)
        next(batches)
        print("read")
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (found.stdout, found.stderr) == ("read\n", "")


def read_on(batches: Batches, results) -> None:
    results.send([tensor.tolist() for _ in range(3) for tensor in rows(batches)])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_begins_a_thread_of_its_own():
    plain, ahead = feed(0), feed(2)
    assert same(rows(plain), rows(ahead))
    context = multiprocessing.get_context("fork")
    results, sender = context.Pipe(duplex=False)
    process = context.Process(target=read_on, args=(ahead, sender), daemon=True)
    process.start()
    expected = [rows(plain) for _ in range(3)]
    assert results.poll(30), "the child waits for a thread that is not there"
    assert results.recv() == [tensor.tolist() for step in expected for tensor in step]
    process.join(20)
    assert process.exitcode == 0
    assert all(same(rows(ahead), step) for step in expected), "the parent reads on as if nothing had happened"


def test_a_negative_depth_is_refused():
    with pytest.raises(ValueError, match="prefetch must be a number of steps from 0, but is -1"):
        feed(-1)
