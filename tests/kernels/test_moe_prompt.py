"""The experts for a prompt without gradients: the reference's results, and the rule for when."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_close

import grist_kernels
from grist_kernels import backend
from grist_kernels.moe import prompt


def _inputs(T: int = 90, A: int = 3, E: int = 9, D: int = 20, F: int = 12):
    draw = torch.Generator().manual_seed(T + E)
    x, weights = torch.randn(T, D, generator=draw), torch.rand(T, A, generator=draw)
    ids = torch.rand(T, E - 1, generator=draw).topk(A, -1).indices  # nobody asks the last expert
    return x, ids, weights, torch.randn(E, D, 2 * F, generator=draw), torch.randn(E, F, D, generator=draw)


@pytest.mark.parametrize("T", [1, 90])
@pytest.mark.parametrize("alpha", [None, 1.702])
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("interleaved", [False, True])
def test_result_is_the_references(T, alpha, limit, interleaved):
    x, ids, weights, w_up, w_down = _inputs(T)
    w_up[-1] = w_down[-1] = float("nan")
    options = {"alpha": alpha, "limit": limit, "interleaved": interleaved}
    with torch.no_grad():
        assert prompt.fits(x, w_up, w_down, None, None)
        got = prompt.moe(x, ids, weights, w_up, w_down, **options)
        with backend.using("reference"):
            wide = [tensor.double().nan_to_num() for tensor in (weights, w_up, w_down)]
            exact = grist_kernels.moe(x.double(), ids, *wide, **options)
    assert_close("out", got.double(), exact, atol=1e-5 * float(exact.abs().max()))


def test_it_takes_prompts_without_gradients_and_nothing_else(monkeypatch):
    x, ids, weights, w_up, w_down = _inputs()
    calls, whole = [], prompt.moe
    monkeypatch.setattr(
        prompt, "moe", lambda *given, **options: (calls.append(len(given[0])), whole(*given, **options))[1]
    )
    grist_kernels.moe(x, ids, weights, w_up, w_down)
    with torch.no_grad():
        grist_kernels.moe(x.double(), ids, weights, w_up.double(), w_down.double())
        grist_kernels.moe(x, ids, weights, w_up, w_down, torch.zeros(9, 24))
        grist_kernels.moe(*_inputs(D=18))
        grist_kernels.moe(x[:0], ids[:0], weights[:0], w_up, w_down)
        assert calls == []
        grist_kernels.moe(x, ids.int(), weights, w_up, w_down)
        assert calls == [90]
        ids[3, 1] = 9
        with pytest.raises(ValueError, match=r"expert_ids must be in \[0, 9\), but range from 0 to 9"):
            grist_kernels.moe(x, ids, weights, w_up, w_down)
