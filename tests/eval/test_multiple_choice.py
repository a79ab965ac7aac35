"""What scores come to: picks, means, standard errors, chance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grist_eval.multiple_choice import chance_of, row_metrics, summary
from grist_eval.row_task import Row, question, schema
from grist_eval.scoring import Score
from grist_eval.statistics import centred, mean_and_error, perplexity_and_error


def test_four_ways_to_compare_answers_of_unlike_lengths():
    row = question("Q:", ["ab", "éééé", "abcdef"], 1)
    scores = [Score(-4.0, False, 1), Score(-7.6, False, 4), Score(-11.7, False, 7)]
    # sums -4, -7.6, -11.7; per character -2, -1.9, -1.95; per byte -2, -0.95, -1.95; per token -4, -1.9, -1.67
    assert row_metrics(row, scores) == {"acc": 0.0, "acc_norm": 1.0, "acc_bytes": 1.0, "acc_tokens": 0.0}
    fewer_bytes = [Score(-4.0, False, 1), Score(-7.6, False, 4), Score(-5.0, False, 7)]
    assert row_metrics(row, fewer_bytes) == {"acc": 0.0, "acc_norm": 0.0, "acc_bytes": 0.0, "acc_tokens": 0.0}


def test_of_equal_answers_the_first_is_picked():
    scores = [Score(-3.0, False, 1), Score(-3.0, False, 1)]
    assert row_metrics(question("Q:", ["a", "b"], 0), scores)["acc"] == 1.0
    assert row_metrics(question("Q:", ["a", "b"], 1), scores)["acc"] == 0.0


def test_a_schema_has_no_answers_to_normalize_by():
    row = schema(["The cat", "The dog"], "sleeps", 1)
    assert (row.contexts, row.continuations) == (("The cat", "The dog"), (" sleeps", " sleeps"))
    assert row_metrics(row, [Score(-3.0, False, 1), Score(-2.0, False, 1)]) == {"acc": 1.0}


def test_a_word_is_right_when_all_its_tokens_are_the_likeliest():
    row = Row(("The",), (" mill",))
    assert row_metrics(row, [Score(-1.5, True, 2)]) == {"acc": 1.0, "log_likelihood": -1.5}


def test_the_error_of_a_mean_is_the_binomial_one():
    values = [1.0] * 30 + [0.0] * 70
    mean, error = mean_and_error(values)
    assert (mean, error) == pytest.approx((0.3, math.sqrt(0.3 * 0.7 / 99)))
    assert error == pytest.approx(np.std(values, ddof=1) / 10)
    assert mean_and_error([1.0]) == (1.0, None)


def test_perplexity_and_its_bootstrap():
    values = np.random.default_rng(0).normal(-2, 0.5, 400).tolist()
    value, error = perplexity_and_error(values)
    assert value == pytest.approx(math.exp(-np.mean(values)))
    assert error == pytest.approx(value * np.std(values) / 20, rel=0.15)  # by the delta method
    assert perplexity_and_error(values) == (value, error)
    assert perplexity_and_error([-2000.0, -2000.0]) == (math.inf, math.inf)


def test_a_summary_names_every_mean_and_error():
    found = summary([{"acc": 1.0, "log_likelihood": -2.0}, {"acc": 0.0, "log_likelihood": -2.0}])
    assert found == {
        "acc": 0.5, "acc_stderr": 0.5, "perplexity": pytest.approx(math.e**2), "perplexity_stderr": pytest.approx(0, abs=1e-9)
    }  # fmt: skip


def test_guessing_is_centred_at_zero():
    rows = [question("Q:", list("ab"), 0), question("Q:", list("abcd"), 0)]
    assert chance_of(rows) == 0.375
    assert centred(0.375, 0.375) == 0
    assert centred(1.0, 0.375) == 1
    assert centred(0.25, 0.5) == -0.5
