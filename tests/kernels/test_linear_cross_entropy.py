"""What is true of the loss, and that it is PyTorch's. R rows, D width, V vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from assertions import assert_close

from grist_kernels import backend, linear_cross_entropy
from grist_kernels.linear_cross_entropy import chunks


@pytest.fixture(params=["auto", "auto in chunks", "reference"], autouse=True)
def _each_implementation(request, monkeypatch):
    mode, *in_chunks = request.param.split(" ", 1)
    if in_chunks:
        monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 4 * 7 * 33)  # seven rows
    with backend.using(mode):
        yield


def _inputs(R=40, D=12, V=33, dtype=torch.float32):
    return torch.randn(R, D, dtype=dtype), torch.randn(V, D, dtype=dtype), torch.randint(0, V, (R,))


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    hidden, weight, targets = _inputs()
    loss = linear_cross_entropy(torch.zeros_like(hidden), weight, targets)
    assert loss.item() == pytest.approx(math.log(33), rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_matches_pytorch(reduction, smoothing):
    hidden, weight, targets = _inputs()
    targets[::3] = -100
    want = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction=reduction, label_smoothing=smoothing)
    got = linear_cross_entropy(hidden, weight, targets, reduction=reduction, label_smoothing=smoothing)
    assert_close("loss", got, want, atol=1e-5, rtol=1e-5)


def test_parts_add_up():
    hidden, weight, targets = _inputs()
    logits = 5.0 * torch.tanh(hidden @ weight.T / 5.0)
    want = torch.nn.functional.cross_entropy(logits, targets) + 0.01 * logits.logsumexp(-1).square().mean()
    got = linear_cross_entropy(hidden, weight, targets, softcap=5.0, z_loss=0.01)
    assert_close("loss", got, want, rtol=1e-5)


def test_mean_is_sum_over_the_rows_that_count():
    hidden, weight, targets = _inputs()
    targets[:15] = -100
    mean, total = (linear_cross_entropy(hidden, weight, targets, reduction=r) for r in ("mean", "sum"))
    assert_close("mean", mean * 25, total, rtol=1e-6)


def test_sums_add_up_over_any_split():
    hidden, weight, targets = _inputs()
    parts = [
        linear_cross_entropy(hidden[s], weight, targets[s], reduction="sum") for s in (slice(0, 13), slice(13, 40))
    ]
    assert_close("sum", parts[0] + parts[1], linear_cross_entropy(hidden, weight, targets, reduction="sum"), rtol=1e-6)


def test_ignored_rows_get_no_gradient():
    hidden, weight, targets = _inputs()
    targets[5] = -100
    hidden[5] = 1e30  # would overflow if it counted
    hidden.requires_grad_()
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, targets, z_loss=0.01).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert_close("ignored row", hidden.grad[5], torch.zeros(12))
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_row_that_counts_is_zero_with_zero_gradients(reduction):
    hidden, weight, targets = _inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), reduction=reduction)
    assert loss.item() == 0
    loss.backward()
    for name, leaf in (("hidden", hidden), ("weight", weight)):
        assert leaf.grad is not None
        assert_close(f"d_{name}", leaf.grad, torch.zeros_like(leaf))


def test_softcap_bounds_the_loss():
    hidden, weight, targets = _inputs()
    loss = linear_cross_entropy(hidden * 1000, weight, targets, softcap=2.0, reduction="none")
    assert loss.max() <= 4.0 + math.log(33)


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "softcap": 3.0, "label_smoothing": 0.2}], ids=["plain", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(options, reduction):
    hidden, weight, targets = _inputs(R=9, D=3, V=33, dtype=torch.float64)
    targets[4] = -100
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, reduction=reduction, **options), leaves
    )


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_needs_a_gradient_gets_one(frozen):
    hidden, weight, targets = _inputs()
    leaf = weight if frozen == "hidden" else hidden
    leaf.requires_grad_()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert leaf.grad is not None
    assert (leaf.grad != 0).any()


def test_gradients_are_scaled_by_what_comes_in():
    hidden, weight, targets = _inputs(dtype=torch.float64)
    hidden.requires_grad_()
    (once,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden)
    (tenfold,) = torch.autograd.grad(10 * linear_cross_entropy(hidden, weight, targets), hidden)
    assert_close("d_hidden", tenfold, 10 * once, rtol=1e-12)


def test_loss_is_float32_in_low_precision():
    hidden, weight, targets = _inputs(dtype=torch.bfloat16)
    assert linear_cross_entropy(hidden, weight, targets).dtype == torch.float32


def test_bad_arguments_are_named():
    hidden, weight, targets = _inputs()
    with pytest.raises(ValueError, match=r"hidden must be \(..., D\) and weight \(V, D\)"):
        linear_cross_entropy(hidden, weight[:, :5], targets)
    with pytest.raises(ValueError, match=r"targets must be \(40,\) int64 to match hidden"):
        linear_cross_entropy(hidden, weight, targets[:5])
    with pytest.raises(ValueError, match="one floating type"):
        linear_cross_entropy(hidden, weight.double(), targets)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, but is 'average'"):
        linear_cross_entropy(hidden, weight, targets, reduction="average")
    with pytest.raises(ValueError, match="softcap must"):
        linear_cross_entropy(hidden, weight, targets, softcap=0.0)
    with pytest.raises(ValueError, match="label_smoothing must"):
        linear_cross_entropy(hidden, weight, targets, label_smoothing=1.0)
    with pytest.raises(ValueError, match="z_loss must"):
        linear_cross_entropy(hidden, weight, targets, z_loss=-0.1)


@pytest.mark.parametrize("wrong", [-1, 33])
def test_target_out_of_range_is_named(wrong):
    hidden, weight, targets = _inputs()
    targets[7] = wrong
    with pytest.raises((ValueError, RuntimeError), match=r"targets must be in \[0, 33\)|out of bounds"):
        linear_cross_entropy(hidden, weight, targets)
