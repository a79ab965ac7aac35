"""Figures of documents and their intervals: the bootstrap against what is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grist_eval.document_figures import figures, intervals, report, together


def test_a_diverged_model_has_infinite_perplexity():
    assert report(800.0 * 10, 10, 30)["perplexity"] == math.inf
    assert math.isnan(report(math.nan, 10, 30)["bits_per_byte"])


def test_the_standard_error_is_that_of_a_mean_where_documents_are_as_long():
    nats_D = np.random.default_rng(1).normal(200, 30, 400)
    size_D = np.full(400, 100)
    found = figures(nats_D, size_D, size_D)
    expected = nats_D.std(ddof=1) / math.sqrt(400) / 100 / math.log(2)
    assert found["bits_per_byte_stderr"] == pytest.approx(expected, rel=0.08)  # 1,000 resamples: 2 % is one deviation
    width = found["bits_per_byte_high"] - found["bits_per_byte_low"]
    assert width == pytest.approx(2 * 1.96 * expected, rel=0.1)
    assert found == figures(nats_D, size_D, size_D)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    draw = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        tokens_D = draw.integers(20, 400, 60)
        nats_D = tokens_D * draw.normal(2.0, 0.5, 60)
        found = intervals(nats_D, tokens_D, tokens_D)
        held += found["bits_per_byte_low"] <= 2.0 / math.log(2) <= found["bits_per_byte_high"]
    assert 178 <= held <= 199  # of 200 at 95 %, two deviations and what the percentiles lack at 60 documents


def test_one_document_and_a_model_that_diverged_have_no_interval():
    one = np.array([3.0]), np.array([2]), np.array([5])
    assert intervals(*one) == {"documents": 1}
    nats_D, size_D = np.array([math.inf, 1.0]), np.array([1, 1])
    assert intervals(nats_D, size_D, size_D) == {"documents": 2}


def test_splits_together_have_the_error_of_independent_parts():
    draw = np.random.default_rng(3)
    parts = [figures(draw.normal(mean, 20, n), np.full(n, 40), np.full(n, 100)) for mean, n in ((150, 300), (220, 500))]
    both = together(parts)
    assert both["documents"] == 800
    assert both["bits_per_byte"] == pytest.approx((parts[0]["bits_per_byte"] * 3 + parts[1]["bits_per_byte"] * 5) / 8)
    expected = math.hypot(3 / 8 * parts[0]["bits_per_byte_stderr"], 5 / 8 * parts[1]["bits_per_byte_stderr"])
    assert both["bits_per_byte_stderr"] == pytest.approx(expected)
