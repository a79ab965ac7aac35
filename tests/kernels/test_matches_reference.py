"""Every op, every case, every implementation that runs here: outputs and gradients against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_close

from grist_kernels import OPS, backend
from grist_kernels.cases import Case, expected, run


def _options(case: Case) -> frozenset:
    """Which arguments a case gives, of which rank, with which options."""
    built = case.arguments(torch.float32)
    return frozenset((k, v.dim() if isinstance(v, torch.Tensor) else v) for k, v in built.items())


PAIRS = [(op, case) for op in OPS.values() for case in op.cases if not case.large]
SMALL = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op, case in PAIRS]
# Cases that differ in sizes alone compile to the same graph: one of each kind is enough.
KINDS = {(op.name, _options(case)): pytest.param(op, case, id=f"{op.name}-{case.name}") for op, case in reversed(PAIRS)}
WITH_GRADIENTS = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op, case in PAIRS if case.gradients]


def _compare(function, op, case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    got = run(function, arguments, case.gradients)
    wanted = expected(op.reference, case, arguments)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(f"{op.name} {case.name} {name}", got[name], value.want, allowed=value.allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "case"), SMALL)
def test_door_matches_reference(op, case, dtype):
    _compare(op.door, op, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "case"), SMALL)
def test_reference_computes_in_float32(op, case, dtype):
    with backend.using("reference"):
        _compare(op.door, op, case, dtype)


@pytest.mark.parametrize(("op", "case"), list(KINDS.values()))
def test_door_compiles_without_a_graph_break(op, case):
    torch._dynamo.reset()
    compiled = torch.compile(op.door, fullgraph=True, backend="aot_eager")
    _compare(compiled, op, case, torch.float32)


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_arguments_are_not_written_to(op, case):
    arguments = case.arguments(torch.float32)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    run(op.door, arguments, case.gradients)
    for name, value in before.items():
        assert torch.equal(arguments[name].nan_to_num(), value.nan_to_num()), f"{op.name} changed {name}"


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_twice_gives_the_same_bits(op, case):
    arguments = case.arguments(torch.float32)
    first, second = (run(op.door, arguments, case.gradients) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{op.name} {case.name} {name} differs between two calls"


@pytest.mark.parametrize(("op", "case"), WITH_GRADIENTS)
def test_incoming_gradient_may_be_expanded(op, case):
    """out.sum().backward() hands down a gradient whose strides are all zero, which some kernels refuse."""
    arguments = case.arguments(torch.float64)

    def gradients(function):
        leaves = {name: arguments[name].detach().requires_grad_() for name in case.gradients}
        result = function(**(arguments | leaves))
        outputs = result if isinstance(result, tuple) else (result,)
        torch.stack([out.sum() for out in outputs]).sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    want = gradients(op.reference)
    for name, grad in gradients(op.door).items():
        assert_close(f"{op.name} {case.name} d_{name}", grad, want[name], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_inference_mode(op, case):
    arguments = case.arguments(torch.float64)
    with torch.inference_mode():
        got = run(op.door, arguments, ())
    for name, value in run(op.reference, arguments, ()).items():
        assert_close(f"{op.name} {case.name} {name}", got[name], value, atol=1e-9, rtol=1e-9)


def test_every_op_has_a_door_a_reference_and_cases():
    assert set(OPS) == set(backend.OP_NAMES)
    for name, op in OPS.items():
        assert op.name == name
        assert op.cases, f"{name} has no cases"
        assert len({case.name for case in op.cases}) == len(op.cases), f"{name} has two cases of one name"
        assert any(case.large for case in op.cases), f"{name} has nothing to benchmark"


def test_tolerance_can_fail():
    """A result that is wrong by a little more than rounding is refused."""
    op = OPS["rms_norm"]
    case = op.cases[0]
    arguments = case.arguments(torch.float32)
    wanted = expected(op.reference, case, arguments)["out"]
    got = run(op.door, arguments, case.gradients)["out"]
    with pytest.raises(AssertionError, match="elements are off"):
        assert_close("out", got * (1 + 1e-5), wanted.want, allowed=wanted.allowed)
