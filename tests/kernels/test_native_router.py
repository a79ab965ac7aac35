"""The native router against PyTorch's composition of it."""

from __future__ import annotations

import pytest
import torch
from native_setting import natively  # noqa: F401

from grist_kernels.native import router

pytestmark = pytest.mark.usefixtures("natively")


def _expected(x, weight, bias, selection, active, over_all):
    logits = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double()).flatten(
        0, -2
    )
    ids = (logits if selection is None else logits + selection.double()).topk(active).indices
    top = logits.gather(-1, ids)
    return ids, (top - logits.logsumexp(-1, keepdim=True)).exp() if over_all else top.softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("over_all", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(("shape", "experts", "active"), [((1, 1), 8, 2), ((3, 2), 33, 4), ((8,), 5, 5), ((1,), 1, 1)])
def test_ids_and_weights_are_those_of_the_formula(shape, experts, active, biases, over_all, dtype):
    x, weight = torch.randn(*shape, 67).to(dtype), torch.randn(experts, 67).to(dtype)
    bias = torch.randn(experts).to(dtype) if biases else None
    selection = 5 * torch.randn(experts) if biases else None
    assert router.fits(x, weight, bias)
    ids, weights = router.route(x, weight, bias, selection, active, over_all)
    want_ids, want = _expected(x, weight, bias, selection, active, over_all)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want.float(), rtol=1e-5, atol=1e-6)


def test_the_first_of_equal_logits_is_chosen_and_nan_gives_experts_that_exist():
    ids, weights = router.route(torch.zeros(1, 16), torch.randn(6, 16), None, None, 3, False)
    assert ids.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(weights, torch.full((1, 3), 1 / 3))
    ids, weights = router.route(torch.full((1, 16), torch.nan), torch.randn(6, 16), None, None, 3, True)
    assert sorted(ids[0].tolist()) == [0, 1, 2]
    assert weights.isnan().all()


def test_many_tokens_gradients_and_strided_weights_go_elsewhere():
    weight = torch.randn(4, 16)
    assert router.fits(torch.randn(8, 16), weight, None)
    assert not router.fits(torch.randn(9, 16), weight, None)
    assert not router.fits(torch.randn(1, 16), torch.randn(16, 4).t(), None)
    assert not router.fits(torch.randn(1, 16).double(), weight.double(), None)
    with torch.enable_grad():
        assert not router.fits(torch.randn(1, 16), weight, None)
