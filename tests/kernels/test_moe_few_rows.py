"""The experts for a few tokens without gradients: every option, the rule for when, and bad ids."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_close
from native_setting import without_native  # noqa: F401

from grist_kernels import moe
from grist_kernels.moe import few_rows, pytorch_fast, reference

pytestmark = pytest.mark.usefixtures("without_native")


def _inputs(T: int, A: int, E: int = 40, D: int = 24, F: int = 10):
    draw = torch.Generator().manual_seed(3)
    x, weights = torch.randn(T, D, generator=draw), torch.rand(T, A, generator=draw)
    ids = torch.rand(T, E, generator=draw).topk(A, -1).indices
    shapes = ((E, D, 2 * F), (E, F, D), (E, 2 * F), (E, D))
    return x, ids, weights, [torch.randn(shape, generator=draw) for shape in shapes]


@pytest.mark.parametrize(("T", "A"), [(1, 1), (1, 4), (3, 4), (16, 4)])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": None, "limit": None, "interleaved": False},
        {"alpha": 1.702, "limit": 7.0, "interleaved": True},
        {"alpha": 1.702, "limit": 0.5, "interleaved": False},
        {"alpha": None, "limit": 0.5, "interleaved": True},
    ],
    ids=["silu", "gpt_oss", "tight", "clamped"],
)
def test_result_is_the_references(T, A, biases, options):
    x, ids, weights, (w_up, w_down, b_up, b_down) = _inputs(T, A)
    given = (w_up, w_down, b_up, b_down) if biases else (w_up, w_down, None, None)
    with torch.no_grad():
        assert few_rows.fits(x, ids, w_up, w_down)
        got = few_rows.moe(x, ids, weights, *given, **options)
        wide = [w_up.double(), w_down.double(), *([b_up.double(), b_down.double()] if biases else [])]
        exact = reference.moe(x.double(), ids, weights.double(), *wide, **options)
    assert_close("out", got.double(), exact, atol=1e-5 * float(exact.abs().max()))


def test_it_takes_few_pairs_without_gradients_and_nothing_else(monkeypatch):
    x, ids, weights, parameters = _inputs(1, 4)
    calls = []
    whole = few_rows.moe
    monkeypatch.setattr(
        few_rows, "moe", lambda *given, **options: (calls.append(given[0].shape[0]), whole(*given, **options))[1]
    )
    assert pytorch_fast.few_rows is few_rows
    moe(x, ids, weights, *parameters)
    assert calls == []  # gradients are on
    with torch.no_grad():
        moe(x.double(), ids, weights, *(p.double() for p in parameters))
        moe(x, ids, weights, parameters[0].transpose(1, 2).contiguous().transpose(1, 2), *parameters[1:])
        moe(x[:, :0].new_zeros(0, 24), ids[:0], weights[:0], *parameters)
        many = _inputs(17, 4)
        moe(*many[:3], *many[3])
        few_experts = _inputs(3, 1, E=1)
        moe(*few_experts[:3], *few_experts[3])
        assert calls == []
        moe(x, ids.int(), weights, *parameters)
        most = _inputs(16, 4)
        moe(*most[:3], *most[3])
    assert calls == [1, 16]


@pytest.mark.parametrize("stray", [-1, 40])
def test_an_expert_that_is_not_there_is_named(stray):
    x, ids, weights, parameters = _inputs(1, 4)
    ids[0, 2] = stray
    with torch.no_grad(), pytest.raises(ValueError, match=rf"expert_ids must be in \[0, 40\), but range .*{stray}"):
        moe(x, ids, weights, *parameters)
