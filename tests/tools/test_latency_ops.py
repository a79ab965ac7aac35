from __future__ import annotations

import pytest
from tiny_house import model

from grist_tools.latency import Shape
from grist_tools.latency_ops import REST, breakdown, parts_table, words_of


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        ("aten::addmm", "matrix products"),
        ("nvjet_tst_128x64_64x6_2x1_v_bz_TNN", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("_grouped_matmul_kernel", "products of experts"),
        ("rms_norm_forward", "norms"),
        ("aten::silu", "activations"),
        ("aten::argmax", "choosing: top-k, sorting, argmax"),
        ("aten::_to_copy", "copies"),
        ("aten::slice", "views"),
        ("aten::mul", "arithmetic"),
        ("something_unheard_of", "something_unheard_of"),
    ],
)
def test_operations_in_words(operation, words):
    assert words_of(operation) == words


def test_parts_are_shares_of_the_whole():
    parts = breakdown(model(), Shape(2, 16, 4), "cpu", 100)
    assert set(parts) == {"prefill", "decode"}
    for found in parts.values():
        assert sum(part.share for part in found) == pytest.approx(1.0, abs=0.05)
        assert [part.ms for part in found] == sorted((part.ms for part in found), reverse=True)
        assert {"matrix products", REST} <= {part.words for part in found}
    assert len(parts_table(parts).splitlines()) == 2 + sum(map(len, parts.values()))


def test_one_token_has_no_decoding():
    assert set(breakdown(model(), Shape(1, 8, 1), "cpu", 3)) == {"prefill"}
