"""Mixtures: shares that hold at every prefix, and clear refusals of mixtures that make no sense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splits_in_memory import split_in_memory

from grist_data.deal import MAX_PERIOD, Deal, exact_counts
from grist_data.mixture import Mixture, Stage

weights = st.lists(st.floats(0.001, 1000), min_size=1, max_size=12)


def prefix_errors(counts: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """(sources,): the largest distance of any prefix from a source's exact share, in samples."""
    seen = np.arange(1, len(sources) + 1)
    return np.array(
        [np.abs(np.cumsum(sources == k) - seen * (n / counts.sum())).max() for k, n in enumerate(counts.tolist())]
    )


@settings(max_examples=25, deadline=None)
@given(weights)
def test_every_prefix_is_within_one_sample_of_every_share(weights):
    counts = exact_counts(weights)
    if not all(counts):
        return
    deal = Deal(counts)
    n = np.arange(min(3 * deal.period, deal.period + 1000))
    sources, draws = deal.draws(n)
    assert prefix_errors(deal.counts, sources).max() < 1 + 1e-9
    for k in range(len(counts)):
        assert (draws[sources == k] == np.arange((sources == k).sum())).all()
        assert (deal.slots(k, draws[sources == k]) == n[sources == k]).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_draws_are_counted_by_arithmetic(counts, data):
    deal = Deal.of(tuple(counts))
    n = data.draw(st.integers(0, 5 * deal.period))
    sources, _ = deal.draws(np.arange(n))
    assert deal.drawn(n).tolist() == [int((sources == k).sum()) for k in range(len(counts))]


def test_many_sources_beside_a_large_one_keep_their_shares():
    """Sorting slots by (rank + 1/2) / count, as is often done, is 2.7 samples off here."""
    deal = Deal(exact_counts([0.55, *[0.05] * 9]))
    sources, _ = deal.draws(np.arange(MAX_PERIOD))
    assert prefix_errors(deal.counts, sources).max() < 1


@settings(max_examples=100, deadline=None)
@given(weights)
def test_counts_are_the_shares_by_largest_remainder(weights):
    counts = np.array(exact_counts(weights))
    period = counts.sum()
    assert 1 <= period <= MAX_PERIOD
    exact = np.array(weights) / sum(weights) * period
    assert np.abs(counts - exact).max() < 1
    up = counts > np.floor(exact + 1e-9)  # rounded up are those with the largest rests
    rests = exact - np.floor(exact + 1e-9)
    assert not up.any() or up.all() or rests[up].min() >= rests[~up].max() - 1e-6


def test_simple_shares_are_exact_in_a_short_period():
    assert exact_counts([0.7, 0.1, 0.2]) == (7, 1, 2)
    assert exact_counts([3e9, 1e9]) == (3, 1)
    assert exact_counts([5]) == (1,)
    assert sum(exact_counts([1 / 3, 1 / 2])) == MAX_PERIOD  # 0.333... as written is no third


def test_the_deal_is_pinned():
    """A run must go on in the same order after an upgrade."""
    sources, _ = Deal((7, 1, 2)).draws(np.arange(10))
    assert sources.tolist() == [0, 0, 0, 2, 0, 0, 1, 0, 0, 2]


def sources(**sizes: int) -> dict[str, Any]:
    return {name: split_in_memory(f"id-{name}", [size]) for name, size in sizes.items()}


A, B = sources(a=100, b=100).items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, {}), "at least one source"),
        ((dict([A, B]), {"a": 1, "c": 1}), "weights name c, but the sources are a, b"),
        ((dict([A, B]), {"a": 1, "b": 0}), "weights must be positive numbers.*leave out a source"),
        ((dict([A, B]), {"a": 1, "b": -1}), "weights must be positive"),
        ((dict([A, B]), {"a": 1, "b": float("nan")}), "weights must be positive"),
        ((dict([A, B]), {"a": 1, "b": float("inf")}), "weights must be positive"),
        ((dict([A]), {}), "weights must be positive numbers, at least one"),
        ((dict([A, B]), {"a": 1, "b": 1e-6}), "the weight of b, 1e-06, is less than one sample in 65,536"),
        ((dict([A, B]), {"a": 1}), "b: a source without a weight in any stage"),
        ((dict([A]), {"a": 1}, (Stage(0),)), "rising positions above 0, but stage 1 begins at 0"),
        ((dict([A]), {"a": 1}, (Stage(9), Stage(9))), "stage 2 begins at 9 and the one before it at 9"),
        ((dict([A, B]), {"a": 1, "b": 1}, (Stage(9, {"c": 1}),)), "weights name c"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mixture(*arguments)


def test_datasets_of_different_tokenizers_are_refused_with_both_hashes():
    other = split_in_memory("id-b", [100], tokenizer="c0ffee")
    with pytest.raises(ValueError, match=r"sources a and b .* a has sha256 tokenizer, b has c0ffee; prepare one"):
        Mixture({"a": A[1], "b": other}, {"a": 1, "b": 1})


def test_one_dataset_under_two_names_is_refused():
    with pytest.raises(ValueError, match="sources a and twin are the same dataset, id-a/train"):
        Mixture({"a": A[1], "twin": split_in_memory("id-a", [100])}, {"a": 1, "twin": 1})


def test_stages_change_what_they_name_and_nothing_else():
    mixture = Mixture(dict([A, B]), {"a": 1, "b": 1}, (Stage(8, sequence_length=4), Stage(16, {"a": 1}, None, 32, 2)))
    first, second, third = mixture.resolved(8, 16, None)
    assert (first.start, first.sequence_length, first.global_batch_size, first.micro_batch_size) == (0, 8, 16, None)
    assert (second.start, second.weights, second.sequence_length, second.global_batch_size) == (
        8,
        {"a": 1, "b": 1},
        4,
        16,
    )
    assert (third.weights, third.sequence_length, third.global_batch_size, third.micro_batch_size) == (
        {"a": 1},
        4,
        32,
        2,
    )


def test_units_must_be_multiples_of_every_length():
    mixture = Mixture(dict([A]), {"a": 1}, (Stage(8, sequence_length=12),))
    assert mixture.unit(mixture.resolved(6, 1, None)) == 12
    with pytest.raises(ValueError, match="sequence_length 8 from position 0 on does not divide the unit of 12 tokens"):
        mixture.unit(mixture.resolved(8, 1, None))
    with pytest.raises(ValueError, match="sequence_length must be at least 1, but is 0"):
        mixture.unit(mixture.resolved(0, 1, None))
    long = Mixture(dict([A]), {"a": 1}, (), unit_tokens=32)
    assert long.unit(long.resolved(8, 1, None)) == 32
