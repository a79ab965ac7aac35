"""What is true of matrix products by segment."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_close

from grist_kernels import backend, grouped_matmul
from grist_kernels.grouped_matmul import pytorch_fast


@pytest.fixture(params=["auto", "reference"])
def _each_implementation(request):
    with backend.using(request.param):
        yield


def _inputs(counts, width_in=16, width_out=24, spare=0, dtype=torch.float32):
    x = torch.randn(sum(counts) + spare, width_in, dtype=dtype)
    w, bias = (
        torch.randn(len(counts), width_in, width_out, dtype=dtype),
        torch.randn(len(counts), width_out, dtype=dtype),
    )
    return x, w, torch.tensor(counts).cumsum(0).int(), bias


@pytest.mark.usefixtures("_each_implementation")
def test_one_expert_is_a_linear_layer():
    x, w, offsets, bias = _inputs([33])
    assert_close("out", grouped_matmul(x, w, offsets, bias), x @ w[0] + bias[0], atol=1e-5)


@pytest.mark.usefixtures("_each_implementation")
def test_rows_of_nobody_are_zero_and_get_no_gradient():
    x, w, offsets, bias = _inputs([5, 0, 9], spare=7)
    x.requires_grad_()
    out = grouped_matmul(x, w, offsets, bias)
    assert_close("out", out[14:], torch.zeros(7, 24))
    out.sum().backward()
    assert x.grad is not None
    assert_close("dx", x.grad[14:], torch.zeros(7, 16))
    assert (x.grad[:14] != 0).all()


@pytest.mark.usefixtures("_each_implementation")
def test_empty_experts_get_gradients_of_exactly_zero():
    x, w, offsets, bias = _inputs([5, 0, 9, 0])
    w.requires_grad_()
    bias.requires_grad_()
    grouped_matmul(x, w, offsets, bias).sum().backward()
    assert w.grad is not None
    assert bias.grad is not None
    for e in (1, 3):
        assert_close(f"dw of expert {e}", w.grad[e], torch.zeros(16, 24))
        assert_close(f"dbias of expert {e}", bias.grad[e], torch.zeros(24))
    assert (w.grad[[0, 2]] != 0).all()


@pytest.mark.usefixtures("_each_implementation")
def test_gradcheck():
    x, w, offsets, bias = _inputs([2, 0, 3], 3, 2, spare=1, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (x, w, bias))
    assert torch.autograd.gradcheck(lambda x, w, bias: grouped_matmul(x, w, offsets, bias), inputs)


@pytest.mark.parametrize("counts", [[33, 0, 31], [64], [0, 0, 5]], ids=str)
def test_the_route_for_a_gpu_gives_the_same(counts, monkeypatch):
    """F.grouped_mm runs on a CPU too, so that what a GPU will take is proven here."""
    x, w, offsets, bias = _inputs(counts, spare=3, dtype=torch.bfloat16)
    dy = torch.randn(x.shape[0], 24, dtype=torch.bfloat16)
    want = (
        pytorch_fast.multiply(x, w, offsets, bias),
        pytorch_fast.multiply(dy, w.transpose(1, 2), offsets, None),
        pytorch_fast.outer(x, dy, offsets),
        pytorch_fast.segment_sum(dy, offsets),
    )
    monkeypatch.setattr(pytorch_fast, "_grouped_mm_fits", lambda a, b: True)
    got = (
        pytorch_fast.multiply(x, w, offsets, bias),
        pytorch_fast.multiply(dy, w.transpose(1, 2), offsets, None),
        pytorch_fast.outer(x, dy, offsets),
        pytorch_fast.segment_sum(dy, offsets),
    )
    for name, a, b in zip(("out", "dx", "dw", "dbias"), got, want, strict=True):
        assert_close(name, a, b, atol=0.07, rtol=0.01)  # two roundings to bfloat16 of values up to 30


def test_the_route_for_a_gpu_is_taken_only_where_its_strides_fit():
    fits = pytorch_fast._aligned
    assert fits(torch.empty(4, 16, 24, dtype=torch.bfloat16))
    assert fits(torch.empty(4, 16, 24, dtype=torch.bfloat16).transpose(1, 2))
    assert not fits(torch.empty(4, 16, 20, dtype=torch.bfloat16))
    assert not fits(torch.empty(64, 64, dtype=torch.bfloat16)[:, ::2])
    assert not fits(torch.ones(1, dtype=torch.bfloat16).expand(16, 16))


def test_bad_arguments_are_named():
    x, w, offsets, bias = _inputs([5, 9])
    with pytest.raises(ValueError, match=r"offsets must be \(2,\) int32 or int64"):
        grouped_matmul(x, w, offsets[:1])
    with pytest.raises(ValueError, match="offsets must rise from 0 to at most 14"):
        grouped_matmul(x, w, torch.tensor([9, 5]))
    with pytest.raises(ValueError, match="offsets must rise from 0 to at most 14"):
        grouped_matmul(x, w, torch.tensor([5, 15]))
    with pytest.raises(ValueError, match=r"x must be \(R, in\) and w \(E, in, out\)"):
        grouped_matmul(x[:, :8], w, offsets)
    with pytest.raises(ValueError, match="one floating type"):
        grouped_matmul(x, w.double(), offsets)
    with pytest.raises(ValueError, match=r"bias must be \(2, 24\)"):
        grouped_matmul(x, w, offsets, bias[:, :5])
