"""moe_mxfp4's Triton kernels in the interpreter, watched: every byte, whatever a router may choose, counts, compilers.

T tokens, D model width, E experts, A active experts per token, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from assertions import assert_close
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from grist_kernels import OPS, backend, launch, moe_mxfp4
from grist_kernels.cases import Case, expected, run
from grist_kernels.moe_mxfp4 import cases
from grist_kernels.moe_mxfp4.dequantise import dequantise_mxfp4

pytest.importorskip("triton")
if not backend.INTERPRETING:
    pytest.skip("needs TRITON_INTERPRET=1, and triton not yet imported without it", allow_module_level=True)

import interpreter_shim
import triton
import triton.language as tl
from interpreter_memory import sparse_strided
from interpreter_sanitizer import Report, sanitized

from grist_kernels.grouped_matmul.launches import SIZES, tile_rows
from grist_kernels.moe_mxfp4 import triton_kernel
from grist_kernels.moe_mxfp4.kernels import decoded

interpreter_shim.install()

OP = OPS["moe_mxfp4"]
WEIGHTS = ("gate_up_blocks", "gate_up_scales", "down_blocks", "down_scales")


@pytest.fixture(autouse=True)
def _triton():
    with backend.using("triton"):
        yield


def arguments_of(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    return next(case for case in OP.cases if case.name == name).arguments(dtype, device)


def in_order(E: int):
    """Expert ids one after another."""
    return lambda T, A: (torch.arange(T * A) % E).view(T, A)


def watched(arguments: dict[str, Any], seed: int = 0, function: Callable = moe_mxfp4) -> tuple[Tensor, Report]:
    """The result of a call under the sanitizer, with guarded inputs."""
    with sanitized(seed) as report:
        guarded = {k: report.guarded(v, k) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        return function(**guarded), report


def agrees(case: Case, dtype: torch.dtype, seed: int = 0) -> None:
    arguments = case.arguments(dtype)
    got, report = watched(arguments, seed)
    wanted = expected(OP.reference, case, arguments)["out"]
    assert_close(case.name, got, wanted.want, allowed=wanted.allowed)
    for launched in report.runs:
        assert not any(launched.unwritten.values()), f"{launched.kernel} left elements unwritten: {launched.unwritten}"


# Decoding.


@triton.jit
def _decode_kernel(words_ptr, scales_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr):
    rows = tl.arange(0, N)[:, None]
    words = tl.load(words_ptr + rows * (K // 8) + tl.arange(0, K // 8)[None, :])
    scales = tl.load(scales_ptr + rows * (K // 32) + tl.arange(0, K // 32)[None, :])
    tl.store(out_ptr + rows * K + tl.arange(0, K)[None, :], decoded(words, scales, N, K, out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_byte_under_every_scale_is_decoded_exactly(dtype):
    """float16 has less range: there the weights are those of float32, rounded once."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    out = torch.empty(256, 512, dtype=dtype)
    launch.run(_decode_kernel, (1,), out.device, blocks.view(torch.int32), scales, out, N=256, K=512)
    want = dequantise_mxfp4(blocks, scales).to(dtype)
    integers = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(out[:255].view(integers), want[:255].view(integers))  # -0.0 too
    assert out[255].isnan().all()
    if dtype != torch.float16:
        assert torch.equal(out[:255].float(), dequantise_mxfp4(blocks, scales)[:255])


# Routing.


@st.composite
def routings(draw) -> Tensor:
    """(T, A) expert ids, as unfair as may be: few favourites, everyone alike, or one after another."""
    E, A, T = (draw(st.sampled_from(choices)) for choices in ([1, 2, 8, 33], [1, 2, 4], [1, 2, 7, 40]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    kind = draw(st.sampled_from(["favourites", "random", "in turn"]))
    if kind == "favourites":
        favourites = draw(st.lists(st.integers(0, E - 1), min_size=1, max_size=3))
        return torch.tensor(favourites)[torch.randint(len(favourites), (T, A), generator=generator)]
    return torch.randint(E, (T, A), generator=generator) if kind == "random" else in_order(E)(T, A)


@settings(max_examples=20, deadline=None)
@given(ids=routings(), bfloat16=st.booleans(), gpt_oss=st.booleans(), bias=st.booleans(), seed=st.integers(0, 9))
@example(ids=torch.full((40, 1), 3), bfloat16=True, gpt_oss=True, bias=True, seed=0)
@example(ids=torch.tensor([[200]]), bfloat16=False, gpt_oss=False, bias=True, seed=0)
def test_any_routing(ids, bfloat16, gpt_oss, bias, seed):
    T, A = ids.shape
    options = cases.GPT_OSS if gpt_oss else {}
    experts = int(ids.max()) + 2  # the last one is always idle
    case = cases._case("drawn", T, 32, experts, A, 32, bias=bias, ids=lambda T, A: ids, **options)
    agrees(case, torch.bfloat16 if bfloat16 else torch.float32, seed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
def test_every_tile_of_every_architecture(size, architecture):
    """Block sizes differ by target; all of them give the reference's results, at widths that few of them divide."""
    rows = {16: 8, 32: 30, 64: 50, 128: 200}[size]
    case = cases._case("tile", rows, 96, 2, 2, 160, ids=in_order(2), **cases.GPT_OSS)
    assert tile_rows(2 * rows, 2) == size
    with launch.assuming(launch.Target(architecture, 4)):
        agrees(case, torch.bfloat16)
        if size <= 32:
            agrees(case, torch.float32)


def test_weights_of_experts_nobody_chose_are_not_looked_at():
    arguments = arguments_of("one_takes_all", torch.bfloat16)
    want, _ = watched(arguments)
    for name in WEIGHTS:
        arguments[name][[0, 1, 2, 4, 5]] = 255
    assert torch.equal(watched(arguments)[0], want)


def test_a_scale_that_is_nan_reaches_the_tokens_of_its_expert():
    for name in ("gate_up_scales", "down_scales"):
        arguments = arguments_of("odd", torch.bfloat16)
        arguments[name][3, 7, -1] = 255
        chose = (arguments["expert_ids"] == 3).any(1)
        assert watched(arguments)[0].isnan().any(1).tolist() == chose.tolist(), name


def test_ids_that_are_no_expert_s_give_nan():
    """To that token, and to no other; on a GPU only the kernel can notice, and here the door would."""
    arguments = arguments_of("odd")
    want, _ = watched(arguments)
    ids = arguments["expert_ids"]
    ids[0, 1], ids[7, 0], ids[9] = -1, 5, 2**31 - 1
    options: dict[str, Any] = {"alpha": None, "limit": None, "interleaved": False}
    got, _ = watched(arguments | options, function=triton_kernel.moe_mxfp4)
    bad = torch.zeros(63, dtype=torch.bool).index_fill(0, torch.tensor([0, 7, 9]), True)
    assert got.isnan().any(1).tolist() == bad.tolist()
    assert_close("the other tokens", got[~bad], want[~bad], atol=1e-5 * float(want.abs().max()))


def test_experts_beyond_32_bits():
    """Words of the last expert begin 2**31 words after the first."""
    T, D, F, E = 3, 512, 1024, 2**14 + 1
    case = cases._case("", T, D, 1, 1, F, bias=False, ids=in_order(1), **cases.GPT_OSS)
    arguments = case.arguments(torch.bfloat16)
    far: dict[str, Any] = {**arguments, "expert_ids": torch.full((T, 1), E - 1)}
    for name in WEIGHTS:
        shape = (E, *arguments[name].shape[1:])
        far[name] = sparse_strided(shape, torch.empty(shape, device="meta").stride(), torch.uint8)
        far[name][-1] = arguments[name][0]
    assert far["gate_up_blocks"][:-1].numel() // 4 == 2**31
    wanted = expected(OP.reference, case, arguments)["out"]
    with sanitized():
        got = moe_mxfp4(**far)
    assert_close("out", got, wanted.want, allowed=wanted.allowed)


# What is launched, copied and waited for.


def test_launches_and_allocations():
    """place, pair, ends; starts and tiles; the activation, what experts make of it, and the result. Slices are not copied."""
    arguments = arguments_of("one_takes_all")
    some = arguments | {"expert_ids": arguments["expert_ids"] - 1}
    some |= {name: arguments[name][1:5] for name in (*WEIGHTS, "b_gate_up", "b_down")}
    for given_arguments in (arguments, some):
        with sanitized() as report:
            triton_kernel.moe_mxfp4(**given_arguments)
        names = ["route_small", "schedule", "gate_up", "down", "combine"]
        assert report.launches == [f"_{name}_kernel" for name in names]
        assert report.allocations == 9


def test_weights_at_any_byte():
    """Words are read at multiples of four bytes: others are copied."""
    arguments = arguments_of("one_takes_all", torch.bfloat16)
    want, _ = watched(arguments)
    for offset in (1, 2, 4):
        moved = dict(arguments)
        for name in WEIGHTS:
            raw = torch.zeros(arguments[name].numel() + offset, dtype=torch.uint8)
            moved[name] = raw[offset:].view(arguments[name].shape).copy_(arguments[name])
        assert torch.equal(moe_mxfp4(**moved), want)


def test_nothing_is_asked_of_the_device(monkeypatch):
    """Tensors without memory have no values: asking for one would raise."""
    launched = []
    monkeypatch.setattr(launch, "run", lambda kernel, grid, *rest, **constants: launched.append(grid))
    arguments = arguments_of("gpt_oss", device="meta")
    assert moe_mxfp4(**arguments).shape == (33, 160)
    assert len(launched) == 5


def test_same_bits_every_time():
    arguments = arguments_of("gpt_oss", torch.bfloat16)
    first, second = (watched(arguments, seed)[0] for seed in (1, 2))
    assert torch.equal(first, second)


def test_no_tokens():
    arguments = arguments_of("gpt_oss")
    empty = {name: arguments[name][:0] for name in ("x", "expert_ids", "expert_weights")}
    got, report = watched(arguments | empty)
    assert got.shape == (0, 160)
    assert "_gate_up_kernel" not in report.launches


def test_a_compiler_sees_one_op():
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    arguments = arguments_of("gpt_oss", torch.bfloat16)
    got = torch.compile(moe_mxfp4, fullgraph=True, backend=keep)(**arguments)
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert called == ["gristmill.moe_mxfp4.default"]
    assert torch.equal(got, moe_mxfp4(**arguments))


@pytest.mark.parametrize("name", ["one_takes_all", "no_bias"])
def test_library_op_keeps_torch_s_rules(name):
    given_arguments: dict[str, Any] = dict.fromkeys(("b_gate_up", "b_down", "alpha", "limit")) | {"interleaved": False}
    given_arguments |= arguments_of(name)
    order = ("x", "expert_ids", "expert_weights", *WEIGHTS, "b_gate_up", "b_down", "alpha", "limit", "interleaved")
    arguments = tuple(given_arguments[key] for key in order)
    results = torch.library.opcheck(torch.ops.gristmill.moe_mxfp4.default, arguments, raise_exception=False)
    assert set(results.values()) == {"SUCCESS"}, results


def test_what_the_kernel_cannot_take_is_an_error():
    arguments = arguments_of("gpt_oss")
    with pytest.raises(RuntimeError, match=r"has no gradients, and one was asked for: call it under torch.no_grad"):
        moe_mxfp4(**arguments | {"x": arguments["x"].clone().requires_grad_()})
    with torch.no_grad():
        run(moe_mxfp4, arguments | {"x": arguments["x"].clone().requires_grad_()}, ())
    with pytest.raises(RuntimeError, match=r"takes float32, bfloat16 and float16, but got torch\.float64"):
        moe_mxfp4(**next(case for case in OP.cases if case.name == "gpt_oss").arguments(torch.float64))
    D, F = 2**16, 2**17
    large: dict[str, Any] = {
        "x": torch.empty(1, D, device="meta"),
        "expert_ids": torch.empty(1, 1, dtype=torch.int64, device="meta"),
        "expert_weights": torch.empty(1, 1, device="meta"),
    }
    shapes = ((1, 2 * F, D // 32, 16), (1, 2 * F, D // 32), (1, D, F // 32, 16), (1, D, F // 32))
    large |= {k: torch.empty(s, dtype=torch.uint8, device="meta") for k, s in zip(WEIGHTS, shapes, strict=True)}
    with pytest.raises(RuntimeError, match="takes matrices of fewer than 17179869184 weights"):
        moe_mxfp4(**large)
