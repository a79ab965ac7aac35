"""What is read through descriptors gives the bits that pointers give, and is read so in the calls that allow it."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest
import torch

from grist_kernels import OPS, attention, backend, launch
from grist_kernels.attention import launches
from grist_kernels.cases import run

pytest.importorskip("triton")
if not backend.INTERPRETING:
    pytest.skip("needs TRITON_INTERPRET=1, and triton not yet imported without it", allow_module_level=True)

import interpreter_shim
from interpreter_sanitizer import sanitized
from triton.tools.tensor_descriptor import TensorDescriptor

from grist_kernels.attention import triton_kernel
from grist_tools.kernel_recorder import recorded

interpreter_shim.install()

SMALL = [case for case in OPS["attention"].cases if not case.large]
HOPPER = launch.Target("sm_90", 4)


@contextmanager
def descriptors(wanted: int, H: int, dtype: torch.dtype = torch.bfloat16):
    """Every attention kernel launched by its formula, with or without descriptors."""
    with ExitStack() as stack:
        for kernel, formula in launches.FORMULAS.items():
            config = {**formula(HOPPER, dtype, launches.size_bucket(H)), "DESCRIPTORS": wanted}
            stack.enter_context(launch.forcing("attention", kernel, config))
        yield


def described(made: list) -> list[bool]:
    """Of each launch with a choice: does it read through descriptors?"""
    for launched in made:
        given = any(isinstance(value, TensorDescriptor) for value in launched.arguments)
        assert given == bool(launched.constants.get("DESCRIPTORS", 0)), launched.name
    return [bool(launched.constants["DESCRIPTORS"]) for launched in made if "DESCRIPTORS" in launched.constants]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_descriptors_give_the_bits_of_pointers(case):
    arguments = case.arguments(torch.bfloat16)
    H = arguments["q"].shape[-1]
    found = {}
    for wanted in (0, 1):
        with backend.using("triton"), descriptors(wanted, H), recorded(execute=True) as made, sanitized() as report:
            guarded = {
                name: report.guarded(value, name) if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
            found[wanted] = run(attention, guarded, case.gradients)
        whole_bytes = all(arguments[name].stride(-2) * 2 % 16 == 0 for name in "qkv")
        possible = wanted == 1 and triton_kernel.padded_width(H) == H and whole_bytes
        assert described(made) == [possible] * 3
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


def _read_by_descriptors(q, k, v) -> list[bool]:
    with backend.using("triton"), descriptors(1, q.shape[-1]), recorded() as made:
        attention(q, k, v)
    return described(made)


def test_who_decides_is_the_layout():
    """Whole rows of a power of two columns, and addresses and strides of whole 16 bytes."""
    q, k, v = (torch.randn(2, 20, heads, 32, dtype=torch.bfloat16) for heads in (4, 2, 2))
    assert _read_by_descriptors(q, k, v) == [True]
    assert _read_by_descriptors(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))) == [True]
    qkv = torch.randn(2, 20, 8, 32, dtype=torch.bfloat16)
    assert _read_by_descriptors(qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]) == [True]
    for name, x in {
        "24 columns": torch.randn(2, 20, 2, 24, dtype=torch.bfloat16),
        "rows of 66 bytes": torch.randn(2, 20, 2, 33, dtype=torch.bfloat16)[..., :32],
        "an address between": torch.randn(2, 20, 2, 40, dtype=torch.bfloat16)[..., 4:36],
        "one head for all": v[:, :, :1].expand(2, 20, 2, 32),
    }.items():
        q = torch.randn(2, 20, 4, x.shape[-1], dtype=torch.bfloat16)
        ours = k if x.shape[-1] == 32 else x
        assert _read_by_descriptors(q, ours, x) == [False], name


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter
def test_no_row_of_another_head_or_batch_or_from_beyond_the_end():
    """A block reaches beyond T: what lies there in memory is the next batch, and there it is NaN."""
    q, k, v = (torch.randn(2, 70, heads, 32, dtype=torch.bfloat16) for heads in (4, 2, 2))
    want = attention(q[:1], k[:1], v[:1])
    k[1], v[1] = torch.nan, torch.nan
    for wanted in (0, 1):
        with backend.using("triton"), descriptors(wanted, 32):
            got = attention(q, k, v)
        assert got[0].isfinite().all()
        assert got[1].isnan().all()
        assert (got[0] - want[0]).abs().max() < 0.05


def test_only_where_the_hardware_has_them():
    for architecture in launch.ARCHITECTURES:
        for dtype in (torch.bfloat16, torch.float32):
            for size in launches.SIZES:
                where = launch.Target(architecture, 4), dtype, size
                may = architecture in ("sm_90", "sm_100") and dtype == torch.bfloat16 and size < 256
                assert {formula(*where)["DESCRIPTORS"] for formula in launches.FORMULAS.values()} == {int(may)}
                assert {config["DESCRIPTORS"] for config in launches.candidates(*where)} == {0, int(may)}
