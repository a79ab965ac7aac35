"""Each fault that the sanitizer is for, made on purpose: it is found, and the same kernel without it passes."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl  # noqa: E402
from interpreter_accesses import OutOfBounds, Race  # noqa: E402
from interpreter_memory import sparse_strided  # noqa: E402
from interpreter_sanitizer import ends, sanitized  # noqa: E402
from interpreter_shim import IntegerOverflow, MaskedLoadWithoutOther  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402


@triton.jit
def _double(x_ptr, y_ptr, n, LOAD: tl.constexpr, STORE: tl.constexpr, N: tl.constexpr):
    """y = 2 x, with the loads and stores masked as told."""
    lanes = tl.program_id(0) * N + tl.arange(0, N)
    if LOAD == "masked":
        x = tl.load(x_ptr + lanes, mask=lanes < n, other=0.0)
    elif LOAD == "no other":
        x = tl.load(x_ptr + lanes, mask=lanes < n)
    else:
        x = tl.load(x_ptr + lanes)
    if STORE == "masked":
        tl.store(y_ptr + lanes, 2 * x, mask=lanes < n)
    else:
        tl.store(y_ptr + lanes, 2 * x)


def double(x: Tensor, load: str = "masked", store: str = "masked", programs: int = 3) -> Tensor:
    y = torch.empty_like(x)
    _double[(programs,)](x, y, x.numel(), load, store, N=4)
    return y


def test_a_kernel_without_a_fault_passes() -> None:
    x = torch.randn(11)
    with sanitized() as report:
        y = double(report.guarded(x))
    assert torch.equal(y, 2 * x)
    assert report.launches == ["_double"]
    assert report.runs[0].grid == (3, 1, 1)
    assert report.runs[0].unwritten == {"y_ptr": 0}
    assert report.allocations == 1


def test_a_load_without_mask() -> None:
    where = r"_double, program \(2, 0, 0\), load: 1 lanes outside of x_ptr.* is 11 elements"
    with sanitized(), pytest.raises(OutOfBounds, match=where):
        double(torch.randn(11), load="unmasked")
    with sanitized():
        double(torch.randn(12), load="unmasked")


def test_a_store_without_mask() -> None:
    with pytest.raises(OutOfBounds, match="store: 1 lanes outside of y_ptr"), sanitized():
        double(torch.randn(11), store="unmasked")
    with sanitized():
        double(torch.randn(12), store="unmasked")


def test_a_masked_load_without_other() -> None:
    with pytest.raises(MaskedLoadWithoutOther), sanitized():
        double(torch.randn(12), load="no other")


def test_elements_that_no_program_stored() -> None:
    with sanitized() as report:
        y = double(torch.randn(11), programs=2)
    assert report.runs[0].unwritten == {"y_ptr": 3}
    assert y.isnan().tolist() == [False] * 8 + [True] * 3


@triton.jit
def _at(x_ptr, y_ptr, at):
    tl.store(y_ptr, tl.load(x_ptr + at))


def test_a_gap_of_a_strided_view() -> None:
    x = torch.arange(24.0).view(4, 6)[:, :3]
    for at in range(-1, 23):
        y = torch.zeros(1)
        with sanitized():
            if 0 <= at <= 20 and at % 6 < 3:
                _at[(1,)](x, y, at)
                assert y.item() == at
                continue
            where = "in the gaps of" if 0 <= at <= 20 else "outside of"
            with pytest.raises(
                OutOfBounds, match=rf"{where} x_ptr, shape \(4, 3\), strides \(6, 1\); the first is {at} "
            ):
                _at[(1,)](x, y, at)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[1:, ::2, ::3],
        lambda x: x.permute(2, 0, 1)[3:],
        lambda x: x[:, 1:2].expand(4, 5, 6),
        lambda x: x[1, 2, 3],
    ],
)
def test_exactly_the_elements_of_a_view_may_be_read(view) -> None:
    whole = torch.arange(120.0).view(4, 5, 6)
    x = view(whole)
    allowed = {int(value) - x.storage_offset() for value in x.flatten()}
    read = set()
    for at in range(-x.storage_offset(), 120 - x.storage_offset()):
        with sanitized():
            try:
                _at[(1,)](x, torch.zeros(1), at)
                read.add(at)
            except OutOfBounds:
                pass
    assert read == allowed


def test_a_neighbour_in_memory_is_out_of_bounds_too() -> None:
    q, k = torch.arange(8.0).view(2, 4).unbind()
    with sanitized(), pytest.raises(OutOfBounds, match="outside of x_ptr"):
        _at[(1,)](q, k, 4)


def test_another_element_size_is_out_of_bounds() -> None:
    x = torch.zeros(4, dtype=torch.bfloat16)
    with sanitized(), pytest.raises(OutOfBounds, match="4 bytes at once of x_ptr, whose elements have 2"):
        _bitcast[(1,)](x, torch.zeros(1))


@triton.jit
def _bitcast(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr.to(tl.pointer_type(tl.float32), bitcast=True)))


def test_one_memory_as_two_element_sizes_is_refused() -> None:
    x = torch.zeros(4)
    with sanitized(), pytest.raises(ValueError, match="y_ptr shares memory with an argument of another element size"):
        _at[(1,)](x, x.view(torch.bfloat16), 0)


def test_tensors_that_are_not_on_the_cpu_are_refused() -> None:
    with (
        sanitized(),
        pytest.raises(ValueError, match="_at: x_ptr must be on the CPU to be interpreted, but is on meta"),
    ):
        _at[(1,)](torch.zeros(1, device="meta"), torch.zeros(1), 0)


@triton.jit
def _foreign(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(tl.load(x_ptr).to(tl.pointer_type(tl.float32), bitcast=True)))


def test_an_address_that_comes_from_no_argument() -> None:
    x = torch.zeros(1)
    with sanitized(), pytest.raises(OutOfBounds, match="an address that comes from no tensor argument"):
        _foreign[(1,)](torch.tensor([x.data_ptr()]), torch.zeros(1))


def test_views_whose_elements_overlap_are_refused() -> None:
    x = torch.zeros(8).as_strided((3, 3), (2, 1))
    with sanitized(), pytest.raises(ValueError, match=r"x_ptr: elements of shape \(3, 3\), strides \(2, 1\) overlap"):
        _at[(1,)](x, torch.zeros(1), 0)


@triton.jit
def _share(x_ptr, y_ptr, READ: tl.constexpr, WRITE: tl.constexpr):
    """Program p reads x[p // READ] and writes y[p // WRITE]; a zero stands for not at all."""
    program = tl.program_id(0)
    value = 0.0
    if READ > 0:
        value = tl.load(x_ptr + program // READ)
    if WRITE > 0:
        tl.store(y_ptr + program // WRITE, value)


@pytest.mark.parametrize("seed", range(4))
def test_programs_that_collide(seed: int) -> None:
    x = torch.zeros(9)
    used = "1 of its elements are also (written|read) by other programs"
    with sanitized(seed):
        _share[(8,)](x, torch.empty(8), 1, 1)
        _share[(8,)](x, torch.empty(8), 4, 1)
        _share[(8,)](x, x, 1, 1)
        with pytest.raises(Race, match="store through y_ptr: 1 of its elements are also written by other programs"):
            _share[(8,)](x, torch.empty(8), 1, 2)
        with pytest.raises(Race, match=f"through x_ptr = y_ptr: {used}"):
            _share[(8,)](x, x, 4, 1)
        with pytest.raises(Race, match=f"through [xy]_ptr: {used}"):
            _share[(8,)](x[:4], x[1:], 4, 1)


@triton.jit
def _hand_over(y_ptr, out_ptr):
    if tl.program_id(0) == 0:
        tl.store(y_ptr, 1.0)
    else:
        tl.store(out_ptr, tl.load(y_ptr))


def test_what_another_program_stores_is_not_read_in_either_order() -> None:
    found = set()
    for seed in range(8):
        with sanitized(seed), pytest.raises(Race) as error:
            _hand_over[(2,)](torch.zeros(1), torch.zeros(1))
        found.add(str(error.value).split(":")[0])
    assert found == {
        "_hand_over, program (0, 0, 0), store through y_ptr",
        "_hand_over, program (1, 0, 0), load through y_ptr",
    }


@triton.jit
def _lanes_collide(y_ptr, SAME: tl.constexpr):
    lanes = tl.arange(0, 4)
    tl.store(y_ptr + lanes // 2, lanes // 2 if SAME else lanes)


def test_lanes_of_one_program_that_collide() -> None:
    y = torch.empty(2, dtype=torch.int32)
    with sanitized():
        _lanes_collide[(1,)](y, True)
        with pytest.raises(Race, match="lanes of one program store different values"):
            _lanes_collide[(1,)](y, False)


@triton.jit
def _order(y_ptr, count_ptr):
    count = tl.load(count_ptr)
    tl.store(count_ptr, count + 1)
    tl.store(y_ptr + tl.program_id(0) + 4 * tl.program_id(1), count)


def test_programs_run_in_an_order_that_the_seed_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interpreter_accesses.Accesses._alone", lambda *_: None)
    orders = []
    for seed in (0, 0, 1):
        y = torch.empty(8, dtype=torch.int32)
        with sanitized(seed):
            _order[(4, 2)](y, torch.zeros(1, dtype=torch.int32))
        assert sorted(y.tolist()) == list(range(8))
        orders.append(y.tolist())
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_only_chosen_programs_run() -> None:
    y = torch.full((10,), torch.nan)
    with sanitized(programs=ends(2)):
        _share[(10,)](torch.zeros(10), y, 1, 1)
    assert y.isnan().tolist() == [False] * 2 + [True] * 6 + [False] * 2
    assert list(ends(3)(4)) == [0, 1, 2, 3]


@triton.jit
def _descriptor(descriptor, y_ptr, column, N: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, N), descriptor.load([0, column]).reshape(N))


def test_descriptors_are_checked_too() -> None:
    x = torch.arange(32.0).view(2, 16)
    y = torch.empty(8)
    with sanitized():
        _descriptor[(1,)](TensorDescriptor.from_tensor(x, [1, 8]), y, 8, 8)
        assert torch.equal(y, x[0, 8:])
        too_wide = TensorDescriptor(x[:, :12], [2, 16], [16, 1], [1, 8])
        with pytest.raises(OutOfBounds, match=r"4 lanes in the gaps of descriptor"):
            _descriptor[(1,)](too_wide, y, 8, 8)


def test_integer_overflow() -> None:
    with sanitized(), pytest.raises(IntegerOverflow):
        _product[(1,)](torch.zeros(1), 2**16, 2**16)


@triton.jit
def _product(y_ptr, a, b):
    tl.store(y_ptr, a * b)


def test_tensors_without_elements() -> None:
    with sanitized() as report:
        nothing = torch.empty(0, 3)
        _share[(2,)](nothing, torch.empty(0, dtype=torch.bfloat16), 0, 0)
        with pytest.raises(OutOfBounds):
            _share[(2,)](nothing, torch.empty(2), 1, 1)
    assert report.launches == ["_share"]


def write_and_fail() -> None:
    with sanitized() as report:
        report.guarded(torch.zeros(3))[1] = 1.0
        raise KeyError


def test_an_error_inside_is_not_replaced_and_the_watch_ends() -> None:
    with pytest.raises(KeyError):
        write_and_fail()
    with sanitized(), pytest.raises(RuntimeError, match="cannot be nested"), sanitized():
        pass
    with sanitized():
        pass


@triton.jit
def _rows(x_ptr, y_ptr, stride, WIDE: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    lanes = tl.arange(0, N)
    tl.store(y_ptr + row * stride + lanes, tl.load(x_ptr + row * stride + lanes) + 1)


def test_strides_beyond_32_bits() -> None:
    stride = 2**31 + 8
    x = sparse_strided((4, 8), (stride, 1), torch.bfloat16)
    x[3] = 2.0
    began = time.perf_counter()
    with sanitized():
        y = torch.empty_strided((4, 8), (stride, 1), dtype=torch.bfloat16)
        _rows[(4,)](x, y, stride, True, 8)
        with pytest.raises(OutOfBounds, match=r"lanes (in the gaps|outside) of x_ptr"):
            _rows[(4,)](x, y, stride + 8, True, 8)
    assert y[:, 0].tolist() == [1, 1, 1, 3]
    assert time.perf_counter() - began < 5, "sparse memory was read or copied whole"


def test_offsets_beyond_32_bits() -> None:
    stride = 2**30 + 8
    x = sparse_strided((4, 8), (stride, 1), torch.bfloat16)
    with sanitized(), pytest.raises(IntegerOverflow):
        _rows[(4,)](x, x, stride, False, 8)
    with sanitized():
        _rows[(4,)](x, x, stride, True, 8)


def test_a_grid_too_large_to_run() -> None:
    rows = 2**24
    x = sparse_strided((rows, 256), (256, 1), torch.bfloat16)
    with sanitized(programs=ends(3)) as report:
        y = torch.empty(rows, 256, dtype=torch.bfloat16)
        _rows[(rows,)](x, y, 256, True, 256)
        assert y[:4, 7].tolist() == [1, 1, 1, 0]
        assert y[-4:, 7].tolist() == [0, 1, 1, 1]
        with pytest.raises(IntegerOverflow):
            _rows[(rows,)](x, y, 256, False, 256)
    assert report.runs[0].unwritten == {}
