"""What only a GPU can show of the compiled kernels: real sizes, determinism, no waiting, graphs, torch.compile."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_close

from grist_kernels import OPS, backend
from grist_kernels.cases import Case, expected, run
from grist_tools.bench_kernels_case import inputs, oracle

pytestmark = pytest.mark.gpu

RUNS = 20  # of one call, for bitwise determinism
PAIRS = [(op, case) for op in OPS.values() for case in op.cases]
SMALL = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op, case in PAIRS if not case.large]
WITH_KERNEL = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op, case in PAIRS
    if not case.large and op.name in backend.TRITON_OPS
]
# One real size of each op with a kernel: the benchmark checks the others before it times them.
LARGE = {op.name: (op, case) for op, case in reversed(PAIRS) if case.large and op.name in backend.TRITON_OPS}


def check(function, op, case: Case, arguments: dict) -> None:
    got = run(function, arguments, case.gradients)
    wanted = expected(oracle(op, case), case, arguments)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(f"{op.name} {case.name} {name}", got[name], value.want, allowed=value.allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "case"), SMALL)
def test_door_matches_reference(op, case, dtype):
    check(op.door, op, case, case.arguments(dtype, "cuda"))


@pytest.mark.parametrize("name", LARGE)
def test_large_case_matches_reference(name):
    op, case = LARGE[name]
    check(op.door, op, case, inputs(case, torch.bfloat16, "cuda"))
    torch.cuda.empty_cache()


@pytest.mark.parametrize("name", LARGE)
def test_same_bits_every_time(name):
    op, case = LARGE[name]
    arguments = inputs(case, torch.bfloat16, "cuda")
    first = run(op.door, arguments, case.gradients)
    assert all(value.isfinite().all() and value.any() for value in first.values())
    for number in range(1, RUNS):
        for key, value in run(op.door, arguments, case.gradients).items():
            assert torch.equal(value, first[key]), f"{op.name} {case.name} {key} differs in run {number}"
    torch.cuda.empty_cache()


LARGE_ATTENTION = [
    "gpt_oss_full", "gpt_oss_window", "head_width_128", "head_width_128_window", "head_width_128_documents",
    "gpt_oss_documents_window",
]  # fmt: skip


@pytest.mark.parametrize("name", LARGE_ATTENTION)
def test_attention_gives_the_same_bits_every_time_lse_included(name):
    """out, lse, dq, dk, dv and d_sinks, right and the same: with sinks and without, both head widths, windows, documents."""
    op = OPS["attention"]
    case = next(case for case in op.cases if case.name == name)
    arguments = {**inputs(case, torch.bfloat16, "cuda"), "return_lse": True}
    first = run(op.door, arguments, case.gradients)
    names = {"out0", "out1", "d_q", "d_k", "d_v"} | ({"d_sinks"} if "sinks" in case.gradients else set())
    assert first.keys() == names
    for key, value in expected(oracle(op, case), case, arguments).items():
        assert_close(f"{name} {key}", first[key], value.want, allowed=value.allowed)
        assert first[key].any()
    for number in range(1, RUNS):
        torch.empty(2**26, device="cuda").fill_(float(number))  # other memory, other values in it, another cache
        for key, value in run(op.door, arguments, case.gradients).items():
            assert torch.equal(value, first[key]), f"{name} {key} differs in run {number}"
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("op", "case"), WITH_KERNEL)
def test_nothing_waits_for_the_device(op, case):
    arguments = case.arguments(torch.bfloat16, "cuda")
    leaves = [arguments[name].requires_grad_() for name in case.gradients]
    before = torch.cuda.get_sync_debug_mode()
    run(op.door, case.arguments(torch.bfloat16, "cuda"), case.gradients)  # what is compiled once is compiled now
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = op.door(**arguments)
        outputs = result if isinstance(result, tuple) else (result,)
        if leaves:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize(("op", "case"), WITH_KERNEL)
def test_captured_in_a_graph(op, case):
    """A graph replays on new data in the same memory."""
    arguments = case.arguments(torch.bfloat16, "cuda")
    other = case.arguments(torch.bfloat16, "cuda", seed=1)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        op.door(**arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        result = op.door(**arguments)
    for name, value in other.items():
        if isinstance(value, torch.Tensor):
            arguments[name].copy_(value)
    graph.replay()
    outputs = result if isinstance(result, tuple) else (result,)
    want = run(op.door, other, ())
    for out, (name, value) in zip(outputs, want.items(), strict=True):
        assert torch.equal(out, value), f"{op.name} {case.name} {name}"


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", LARGE)
def test_compiled_by_inductor_gives_the_same_bits(name, dynamic):
    op = LARGE[name][0]
    case = op.cases[1]
    arguments = case.arguments(torch.bfloat16, "cuda")
    want = run(op.door, arguments, case.gradients)
    torch._dynamo.reset()
    got = run(torch.compile(op.door, fullgraph=True, dynamic=dynamic), arguments, case.gradients)
    for key, value in want.items():
        assert torch.equal(got[key], value), f"{op.name} {case.name} {key} differs when compiled"


def test_a_tensor_on_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    op = OPS["rms_norm"]
    case = op.cases[1]
    check(op.door, op, case, case.arguments(torch.bfloat16, "cuda:1"))
