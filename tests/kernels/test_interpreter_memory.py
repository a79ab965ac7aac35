"""Memory for kernels under test: fresh memory is poisoned, forbidden writes are found, huge memory costs nothing."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from interpreter_memory import SPARSE_BYTES, Guarded, Overwritten, sparse_strided
from interpreter_sanitizer import sanitized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32])
def test_fresh_memory_is_poisoned(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.utils.deterministic, "fill_uninitialized_memory", False
    )  # which does the same, without guards
    like = torch.zeros(3, 5, dtype=dtype)
    with sanitized() as report:
        made = [
            torch.empty(3, 5, dtype=dtype),
            torch.empty_like(like),
            torch.empty_strided((3, 5), (8, 1), dtype=dtype),
            like.new_empty(3, 5),
            like.new_empty_strided((3, 5), (1, 3)),
        ]
        assert report.allocations == 5
        like.view(5, 3)
        assert report.allocations == 5
        torch.zeros(3)
        like.clone()
        assert report.allocations == 7
    assert [tensor.stride() for tensor in made] == [(5, 1), (5, 1), (8, 1), (5, 1), (1, 3)]
    for tensor in made:
        assert tensor.shape == (3, 5)
        assert tensor.dtype == dtype
        assert (tensor.isnan() if dtype.is_floating_point else tensor > 2**30).all()


def test_the_memory_of_a_backward_pass_is_poisoned_too() -> None:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return torch.empty_like(dy)

    x = torch.zeros(3, requires_grad=True)
    with sanitized():
        Function.apply(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isnan().all()


@sanitized()
def overwrite(at: int) -> None:
    y = torch.empty_strided((4, 3), (5, 1))
    y.as_strided((1,), (1,), y.storage_offset() + at).fill_(1.0)


@pytest.mark.parametrize("at", [-1, 3, 9, 18])
def test_a_guard_zone_or_gap_that_was_overwritten(at: int) -> None:
    """By something other than a kernel under watch: here PyTorch itself, through a view of what is not the tensor's."""
    with pytest.raises(
        Overwritten, match=rf"shape \(4, 3\), strides \(5, 1\): .* belongs to element {at} of its memory"
    ):
        overwrite(at)
    overwrite(at + 3 if at < 0 else at - 3)


def test_guarded_inputs() -> None:
    x = torch.randn(4, 6)[:, :3].requires_grad_()
    with sanitized() as report:
        copy = report.guarded(x)
        assert report.allocations == 0
    assert torch.equal(copy, x)
    assert copy.stride() == (6, 1)
    assert copy.is_leaf
    assert copy.requires_grad
    assert copy.as_strided((4, 6), (6, 1))[:3, 3:].isnan().all()
    expanded = torch.randn(3, 1).expand(3, 4)
    with sanitized() as report:
        copy = report.guarded(expanded)
    assert torch.equal(copy, expanded)
    assert copy.stride() == (1, 0)


def test_an_input_that_was_written() -> None:
    with pytest.raises(Overwritten, match="x: the input was written"), sanitized() as report:
        report.guarded(torch.zeros(3), "x")[1] = 1.0
    with sanitized() as report:
        report.guarded(torch.zeros(3), "x", writable=True)[1] = 1.0
    with pytest.raises(Overwritten, match="x, shape"), sanitized() as report:
        report.guarded(torch.zeros(4, 6)[:, :3], "x", writable=True).as_strided((24,), (1,)).fill_(1.0)


def test_a_library_op_hides_its_allocations_and_is_refused() -> None:
    with torch.library._scoped_library("gristmill", "FRAGMENT") as library:
        library.define("hides(Tensor x) -> Tensor")
        library.impl("hides", torch.empty_like, "CompositeExplicitAutograd")
        with sanitized(), pytest.raises(NotImplementedError, match=r"gristmill\.hides\.default hides its allocations"):
            torch.ops.gristmill.hides(torch.zeros(1))


def test_a_tensor_without_elements_is_guarded_too() -> None:
    Guarded((0, 3), (3, 1), torch.float32, "empty").check()


def test_memory_larger_than_the_machine_costs_what_is_written() -> None:
    x = sparse_strided((1024, 3, 8), (2**34, 16, 1), torch.float32)
    assert x.untyped_storage().nbytes() > 2**45
    x[::512, 1] = torch.arange(8.0)
    assert x[512, 1].tolist() == list(range(8))
    assert x[513].eq(0).all()
    with sanitized() as report:
        y = torch.empty(SPARSE_BYTES, dtype=torch.bfloat16)
    assert report.allocations == 1
    assert y[-3:].tolist() == [0, 0, 0]
