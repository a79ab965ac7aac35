"""The repaired interpreter computes what PyTorch does, bit for bit, and refuses what a GPU leaves undefined."""

# Kernel bodies are Triton's language, whose types are not Python's:
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import interpreter_shim  # noqa: E402
import triton.language as tl  # noqa: E402

interpreter_shim.install()


def every_bfloat16(seed: int) -> Tensor:
    """All 2**16 bit patterns in some order: zeros, subnormals, infinities and NaN among them."""
    order = torch.randperm(2**16, generator=torch.Generator().manual_seed(seed))
    return (order - 2**15).to(torch.int16).view(torch.bfloat16)


def assert_same(got: Tensor, want: Tensor) -> None:
    """Equal bits, except that any NaN is as good as any other."""
    assert got.dtype == want.dtype
    assert torch.equal(got.isnan(), want.isnan())
    bits = torch.int16 if got.element_size() == 2 else torch.int32
    differ = (got.view(bits) != want.view(bits)) & ~want.isnan()
    assert not differ.any(), f"{int(differ.sum())} differ, first {got[differ][0]} for {want[differ][0]}"


@triton.jit
def _binary(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    x = tl.load(x_ptr + lanes)
    y = tl.load(y_ptr + lanes)
    if OP == "add":
        tl.store(out_ptr + lanes, x + y)
    elif OP == "sub":
        tl.store(out_ptr + lanes, x - y)
    elif OP == "mul":
        tl.store(out_ptr + lanes, x * y)
    elif OP == "div":
        tl.store(out_ptr + lanes, x / y)
    elif OP == "less":
        tl.store(out_ptr + lanes, x < y)
    elif OP == "equal":
        tl.store(out_ptr + lanes, x == y)
    elif OP == "where":
        tl.store(out_ptr + lanes, tl.where(x > y, x, 0.5))


BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "less": torch.lt,
    "equal": torch.eq,
    "where": lambda x, y: torch.where(x > y, x, torch.tensor(0.5, dtype=x.dtype)),
}


@pytest.mark.parametrize("op", BINARY)
def test_arithmetic_in_bfloat16(op: str) -> None:
    x, y = every_bfloat16(0), every_bfloat16(1)
    y[:256] = x[:256]
    want = BINARY[op](x, y)
    got = torch.empty_like(want)
    _binary[(1,)](x, y, got, op, 2**16)
    if want.dtype == torch.bool:
        assert torch.equal(got, want)
    else:
        assert_same(got, want)


@triton.jit
def _copy(x_ptr, out_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes))


@triton.jit
def _convert(x_ptr, out_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes).to(out_ptr.dtype.element_ty, fp_downcast_rounding="rtne"))


def around_every_bfloat16() -> Tensor:
    """For every bfloat16 the float32 beside it: just below, at and just above the tie, where rounding decides."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] * 2**16
    return (
        (bits + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x4000, 0xC000]))
        .to(torch.int32)
        .view(torch.float32)
        .flatten()
    )


@pytest.mark.parametrize("kernel", [_copy, _convert], ids=["at the store", "explicit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_is_rounded_to_nearest_even(kernel, dtype: torch.dtype) -> None:
    x = around_every_bfloat16()
    got = torch.empty(x.shape, dtype=dtype)
    kernel[(1,)](x, got, x.numel())
    assert_same(got, x.to(dtype))


def test_bfloat16_is_widened_exactly() -> None:
    x = every_bfloat16(0)
    got = torch.empty(x.shape, dtype=torch.float32)
    _copy[(1,)](x, got, x.numel())
    assert_same(got, x.float())


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16])
def test_casts_between_bfloat16_and_other_types(dtype: torch.dtype) -> None:
    x = torch.arange(-512, 512).to(dtype)
    narrow = torch.empty(x.shape, dtype=torch.bfloat16)
    _copy[(1,)](x, narrow, 1024)
    assert_same(narrow, x.to(torch.bfloat16))
    back = torch.empty_like(x)
    _copy[(1,)](narrow, back, 1024)
    assert torch.equal(back, narrow.to(dtype))


@triton.jit
def _unary(x_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    x = tl.load(x_ptr + lanes)
    if OP == "neg":
        tl.store(out_ptr + lanes, -x)
    elif OP == "abs":
        tl.store(out_ptr + lanes, tl.abs(x))
    elif OP == "full":
        tl.store(out_ptr + lanes, x + tl.full((N,), 1.5, tl.bfloat16))
    elif OP == "fma":
        tl.store(out_ptr + lanes, tl.fma(x, x, x))


UNARY = {
    "neg": lambda x: 0.0 - x,
    "abs": torch.abs,
    "full": lambda x: x + 1.5,
    "fma": lambda x: (x.float() * x.float() + x.float()).bfloat16(),
}


@pytest.mark.parametrize("op", UNARY)
def test_functions_of_one_bfloat16(op: str) -> None:
    x = every_bfloat16(0)
    got = torch.empty_like(x)
    _unary[(1,)](x, got, op, x.numel())
    assert_same(got, UNARY[op](x))


@triton.jit
def _reduce(x_ptr, out_ptr, OP: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    rows = tl.arange(0, R)
    x = tl.load(x_ptr + rows[:, None] * N + tl.arange(0, N)[None, :])
    if OP == "sum":
        tl.store(out_ptr + rows, tl.sum(x, 1))
    elif OP == "max":
        tl.store(out_ptr + rows, tl.max(x, 1))
    elif OP == "min":
        tl.store(out_ptr + rows, tl.min(x, 1))
    elif OP == "argmax":
        tl.store(out_ptr + rows, tl.argmax(x, 1).to(tl.float32))
    elif OP == "whole":
        tl.store(out_ptr + rows, tl.zeros((R,), tl.float32) + tl.sum(x))


REDUCTIONS = {
    "sum": lambda x: x.sum(1),
    "max": lambda x: x.amax(1),
    "min": lambda x: x.amin(1),
    "argmax": lambda x: x.argmax(1).float().bfloat16(),
    "whole": lambda x: x.sum().expand(4),
}


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reductions_of_bfloat16(op: str) -> None:
    # Sums of these are exact in float32, in whatever order.
    x = torch.randint(-64, 64, (4, 32)).bfloat16() / 8
    got = torch.empty(4, dtype=torch.bfloat16)
    _reduce[(1,)](x, got, op, 4, 32)
    assert_same(got, REDUCTIONS[op](x).contiguous())


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    accumulator = tl.full((N, N), 0.25, tl.float32)
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), accumulator))


def test_dot_of_bfloat16_sums_in_float32() -> None:
    a, b = torch.randint(-64, 64, (2, 32, 32)).bfloat16() / 8  # exact in whatever order
    got = torch.empty(32, 32)
    _dot[(1,)](a, b, got, 32)
    assert torch.equal(got, a.float() @ b.float() + 0.25)


@triton.jit
def _maximum(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    x = tl.load(x_ptr + lanes)
    y = tl.load(y_ptr + lanes)
    tl.store(out_ptr + lanes, tl.maximum(x, y))
    tl.store(out_ptr + N + lanes, tl.minimum(x, y))
    tl.store(out_ptr + 2 * N + lanes, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))


def test_maximum_and_minimum_pass_over_nan() -> None:
    x, y = torch.tensor([1.0, torch.nan, 3.0, torch.nan]), torch.tensor([2.0, 2.0, torch.nan, torch.nan])
    got = torch.empty(3, 4)
    _maximum[(1,)](x, y, got, 4)
    assert_same(got, torch.stack([torch.fmax(x, y), torch.fmin(x, y), torch.maximum(x, y)]))


@triton.jit
def _loop(n_ptr, out_ptr, n, NATIVE: tl.constexpr):
    total = tl.load(n_ptr) * 0
    if NATIVE:
        for i in range(1, n + 1):
            total += i
    else:
        for i in tl.range(1, tl.load(n_ptr) + 1, num_stages=2):
            total += i
    tl.store(out_ptr, total)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_loops_to_a_runtime_bound(native: bool, dtype: torch.dtype) -> None:
    n, got = torch.tensor([10], dtype=dtype), torch.zeros(1, dtype=dtype)
    _loop[(1,)](n, got, 10, native)
    assert got.item() == 55


@triton.jit
def _scalars(out_ptr, factor, large, flag):
    tl.store(out_ptr, factor.to(tl.float32))
    tl.store(out_ptr + 1, (large * large // large == large).to(tl.float32))
    tl.store(out_ptr + 2, flag.to(tl.float32))


def test_scalar_arguments_have_the_types_that_a_compiled_kernel_gives_them() -> None:
    got = torch.zeros(3)
    _scalars[(1,)](got, 0.1, 2**31, True)
    assert torch.equal(got, torch.tensor([0.1, 1.0, 1.0]))


def test_installing_where_kernels_are_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter_shim.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="needs TRITON_INTERPRET=1"):
        interpreter_shim.install()


def test_an_unknown_keyword_is_refused() -> None:
    with pytest.raises(TypeError, match="_copy has no parameter 'BLOCK'; it has x_ptr, out_ptr, N"):
        _copy[(1,)](torch.zeros(1), torch.zeros(1), N=1, BLOCK=2)
    _copy[(1,)](torch.zeros(1), torch.zeros(1), N=1, num_warps=4, num_stages=2)


@triton.jit
def _masked(x_ptr, out_ptr, n, OTHER: tl.constexpr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    if OTHER:
        first = tl.load(x_ptr, mask=n > 0, other=0.0)
        x = tl.load(x_ptr + lanes, mask=lanes < n, other=0.0) + first
    else:
        x = tl.load(x_ptr + lanes, mask=lanes < n)
    tl.store(out_ptr + lanes, x)


def test_a_masked_load_must_say_what_the_other_lanes_hold() -> None:
    x, got = torch.ones(4), torch.empty(4)
    with pytest.raises(interpreter_shim.MaskedLoadWithoutOther, match="masked load without other="):
        _masked[(1,)](x, got, 4, OTHER=False, N=4)
    _masked[(1,)](x, got, 3, OTHER=True, N=4)
    assert got.tolist() == [2, 2, 2, 1]


@triton.jit
def _block_pointer(x_ptr, out_ptr, n, PADDING: tl.constexpr, N: tl.constexpr):
    block = tl.make_block_ptr(x_ptr, (n,), (1,), (0,), (N,), (0,))
    tl.store(out_ptr + tl.arange(0, N), tl.load(block, boundary_check=(0,), padding_option=PADDING))


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_a_block_pointer_must_say_what_lies_beyond_its_shape() -> None:
    x, got = torch.ones(4), torch.empty(4)
    with pytest.raises(interpreter_shim.MaskedLoadWithoutOther, match="padding_option"):
        _block_pointer[(1,)](x, got, 3, "", 4)
    _block_pointer[(1,)](x, got, 4, "", 4)
    assert got.tolist() == [1, 1, 1, 1]
    _block_pointer[(1,)](x, got, 3, "zero", 4)
    assert got.tolist() == [1, 1, 1, 0]


@triton.jit
def _integers(out_ptr, a, b, OP: tl.constexpr):
    if OP == "add":
        result = a + b
    elif OP == "sub":
        result = a - b
    elif OP == "mul":
        result = a * b
    elif OP == "wide":
        result = a.to(tl.int64) * b
    elif OP == "wrapping":
        result = tl.mul(a, b, sanitize_overflow=False)
    elif OP == "tl.range":
        result = 0
        for i in tl.range(1, a):
            result = i * 2147483647
    elif OP == "range":
        result = 0
        for i in range(1, a):
            result = i * 2147483647
    tl.store(out_ptr, result)


OVERFLOWS = {
    "add": (2**31 - 1, 1),
    "sub": (-(2**31), 1),
    "mul": (2**16, 2**15),
    "tl.range": (3, 0),
    "range": (3, 0),
}


@pytest.mark.parametrize("op", OVERFLOWS)
def test_int32_overflow_is_an_error(op: str) -> None:
    a, b = OVERFLOWS[op]
    got = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(interpreter_shim.IntegerOverflow, match=r"int32.*compute it in int64"):
        _integers[(1,)](got, a, b, op)
    _integers[(1,)](got, 2, 1, op)


def test_arithmetic_in_int64_and_wrapping_on_purpose_are_not_overflows() -> None:
    got = torch.zeros(1, dtype=torch.int64)
    _integers[(1,)](got, 2**16, 2**16, "wide")
    assert got.item() == 2**32
    _integers[(1,)](got, 2**16, 2**16, "wrapping")
    assert got.item() == 0


@triton.jit
def _product_offset(x_ptr, out_ptr, row, stride):
    tl.store(out_ptr, tl.load(x_ptr + row * stride))


def test_a_pointer_offset_whose_product_overflows_is_an_error() -> None:
    with pytest.raises(interpreter_shim.IntegerOverflow, match="mul gives 4294967296"):
        _product_offset[(1,)](torch.zeros(1), torch.zeros(1), 2**16, 2**16)


@triton.jit
def _device_function(x):
    return tl.sum(x, 0) + 1


@triton.jit
def _calls(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0), _device_function(tl.load(x_ptr + tl.program_id(0) * N + tl.arange(0, N))))


def test_device_functions_and_grids() -> None:
    x, got = torch.arange(12.0), torch.empty(3)
    _calls[lambda meta: (12 // meta["N"],)](x, got, N=4)
    assert torch.equal(got, x.view(3, 4).sum(1) + 1)
