"""The computed shuffle must be a bijection for every size, and must not be a bad shuffle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grist_data.permutation import Feistel, hash64


def assert_bijection(size: int, key: tuple) -> None:
    permuted = Feistel(size, key)
    ids = permuted(np.arange(size))
    assert ids.dtype == np.int64
    assert (np.bincount(ids, minlength=size) == 1).all(), f"size {size}, key {key}"
    assert (permuted.inverse(ids) == np.arange(size)).all()


def test_every_small_size_is_a_bijection():
    places = np.arange(5000)
    for size in range(1, 5001):
        seen = np.zeros(size, bool)
        seen[Feistel(size, (size, "source", 0))(places[:size])] = True
        assert seen.all(), f"size {size}"


@pytest.mark.parametrize("power", [12, 15, 16, 17, 18])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_sizes_around_powers_of_two_are_bijections(power, offset):
    assert_bijection(2**power + offset, (3, "source", 1))


@pytest.mark.parametrize("power", [20, 24, 31, 32, 33, 39, 40])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_sizes_too_large_to_be_counted_are_injective(power, offset):
    """Both ends and a sample between: every place has its own id, inside, and leads back."""
    size = 2**power + offset
    inside = np.random.default_rng(power).integers(0, size, 3000)
    places = np.unique(np.concatenate([np.arange(500), inside, np.arange(size - 500, size)]))
    permuted = Feistel(size, (3, "source", 1))
    ids = permuted(places)
    assert ids.min() >= 0
    assert ids.max() < size
    assert len(np.unique(ids)) == len(places)
    assert (permuted.inverse(ids) == places).all()
    assert (permuted(permuted.inverse(places)) == places).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(-(2**70), 2**70), st.text(), st.integers(0, 10**6))
def test_any_size_and_key_is_a_bijection(size, seed, source, epoch):
    assert_bijection(size, (seed, source, epoch))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2**62), st.data())
def test_inverse_at_any_size(size, data):
    permuted = Feistel(size, (7,))
    position = data.draw(st.integers(0, size - 1))
    id_ = permuted(position)
    assert isinstance(id_, int)
    assert 0 <= id_ < size
    assert permuted.inverse(id_) == position


def test_scalars_and_blocks_agree():
    permuted = Feistel(1000, (1,))
    assert [permuted(i) for i in range(50)] == permuted(np.arange(50)).tolist()
    assert permuted(np.zeros(0, np.int64)).tolist() == []


def test_order_is_pinned():
    """A run must go on in the same order after an upgrade."""
    assert Feistel(10, (0, "source", 0))(np.arange(10)).tolist() == [2, 9, 4, 3, 6, 1, 8, 5, 0, 7]
    assert hash64("phase", 1, "source", 2) == 0xB56541F8262AB25A


def test_keys_give_different_orders():
    orders = {
        Feistel(1000, key)(np.arange(1000)).tobytes() for key in [(0, 0), (0, 1), (1, 0), (1, 1), ("0", 0), (10, 1)]
    }
    assert len(orders) == 6


def test_neighbours_are_not_kept_together():
    n = 20_000
    kept = [np.mean(np.abs(np.diff(Feistel(n, (key,))(np.arange(n)))) == 1) * n for key in range(20)]
    assert np.mean(kept) < 4  # a random order has 2, two rounds have 32


def test_prefixes_are_spread_evenly():
    n, parts, batch = 20_000, 20, 100
    chi2 = []
    for key in range(10):
        part = Feistel(n, (key,))(np.arange(n)) // (n // parts)
        counts = np.stack([np.bincount(row, minlength=parts) for row in part.reshape(-1, batch)])
        chi2.append(((counts - batch / parts) ** 2 / (batch / parts)).sum(1).mean() / (parts - 1))
    assert 0.9 < np.mean(chi2) < 1.1


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match="size from 1 to 2"):
        Feistel(size, (0,))


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside_are_refused(position):
    with pytest.raises(ValueError, match=r"must lie in \[0, 10\)"):
        Feistel(10, (0,))(position)


def test_hash_frames_its_parts():
    assert (
        len({hash64(1, 23), hash64(12, 3), hash64("1", 23), hash64("12", "3"), hash64("1", "23"), hash64(b"1", 23)})
        == 5
    )
    assert hash64(-1) == hash64(2**64 - 1)
