"""quantized_linear's Triton kernel in the interpreter, watched: every case, tails, shares, rows far apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import assert_close
from torch import Tensor

from grist_kernels import OPS, backend, launch, quantized_linear
from grist_kernels.cases import expected
from grist_kernels.quantized import PackedWeight

pytest.importorskip("triton")
if not backend.INTERPRETING:
    pytest.skip("needs TRITON_INTERPRET=1, and triton not yet imported without it", allow_module_level=True)

import interpreter_shim
from interpreter_memory import sparse_strided
from interpreter_sanitizer import Report, sanitized

from grist_kernels.launch import Target
from grist_kernels.quantized_linear import cases
from grist_kernels.quantized_linear.launches import config_of, shares_of, tile_rows

interpreter_shim.install()

OP = OPS["quantized_linear"]
SMALL = [case for case in OP.cases if not case.large]


@pytest.fixture(autouse=True)
def _triton():
    with backend.using("triton"), torch.no_grad():
        yield


def watched(arguments: dict[str, Any]) -> tuple[Tensor, Report]:
    """The result of a call under the sanitizer, with guarded inputs."""
    with sanitized() as report:

        def guarded(name: str, value: Any) -> Any:
            if isinstance(value, PackedWeight):
                return type(value)(**{part: report.guarded(t, f"{name}.{part}") for part, t in value.tensors.items()})
            return report.guarded(value, name) if isinstance(value, Tensor) else value

        return quantized_linear(**{name: guarded(name, value) for name, value in arguments.items()}), report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_agrees_and_stays_in_bounds(case, dtype):
    arguments = case.arguments(dtype)
    got, report = watched(arguments)
    wanted = expected(OP.reference, case, arguments)["out"]
    assert_close(case.name, got, wanted.want, allowed=wanted.allowed)
    for launched in report.runs:
        assert not any(launched.unwritten.values()), f"{launched.kernel} left elements unwritten: {launched.unwritten}"


@pytest.mark.parametrize("name", ["int8_rows", "int4_zeros_rows", "mxfp4_rows"])
def test_launches_and_allocations(name):
    """Shares of a product are added by a second launch; a whole one is stored where it belongs."""
    case = next(case for case in OP.cases if case.name == name)
    _, report = watched(case.arguments(torch.bfloat16))
    assert (len(report.launches), report.allocations) == (1, 1)
    with launch.forcing("quantized_linear", "forward", config_of(32, 32, 4, 1)):
        _, report = watched(case.arguments(torch.bfloat16))
    assert (len(report.launches), report.allocations) == (2, 2)


def test_shares_fill_the_processors_and_stay_long():
    target, config = Target("sm_90", 132), config_of(64, 128, 4, 4)
    assert shares_of(target, 1, 4096, 4096, 16, config) == 4  # 64 programs: 256 of 264
    assert shares_of(target, 1, 128, 14336, 16, config) == 8
    assert shares_of(target, 1, 128, 1024, 16, config) == 2  # of four blocks each
    assert shares_of(target, 1, 2**16, 4096, 16, config) == 1
    assert shares_of(target, 64, 128, 4096, 64, config) == 1
    assert [tile_rows(rows) for rows in (1, 16, 17, 64, 65, 9999)] == [16, 16, 64, 64, 128, 128]


@pytest.mark.parametrize("name", ["int8_one_row", "int4_one_row", "mxfp4_one_row", "fp8_one_row"])
def test_any_number_of_shares_gives_the_product(name):
    case = next(case for case in OP.cases if case.name == name)
    arguments = case.arguments(torch.float32)
    wanted = expected(OP.reference, case, arguments)["out"]
    with launch.forcing("quantized_linear", "forward", config_of(64, 32, 4, 1)):
        assert_close(name, watched(arguments)[0], wanted.want, allowed=wanted.allowed)


def test_rows_far_apart():
    """Offsets beyond 2**31 elements."""
    weight = cases.int4(32)(torch.Generator().manual_seed(0), 40, 64)
    x = sparse_strided((3, 64), (2**30, 1), torch.float32).copy_(torch.randn(3, 64))
    got, want = quantized_linear(x, weight), quantized_linear(x.clone(memory_format=torch.contiguous_format), weight)
    assert torch.equal(got, want)


def test_what_the_kernel_cannot_take():
    x, weight = torch.zeros(1, 64, requires_grad=True), cases.int8(torch.Generator().manual_seed(0), 4, 64)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="has no gradients"):
        quantized_linear(x, weight)
    with pytest.raises(RuntimeError, match="takes float32, bfloat16 and float16"):
        quantized_linear(x.detach().double(), weight)
