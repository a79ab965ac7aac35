"""The Triton kernels in Triton's interpreter, watched: every op, case and type against the reference in float64.

interpreter_sanitizer says what is watched: addresses, races, order, fresh memory, integer overflow.
"""

from __future__ import annotations

import pytest
import torch
from assertions import assert_close
from functorch.compile import make_boxed_compiler
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from grist_kernels import OPS, backend
from grist_kernels.cases import Case, expected, run

pytest.importorskip("triton")
if not backend.INTERPRETING:
    pytest.skip("needs TRITON_INTERPRET=1, and triton not yet imported without it", allow_module_level=True)

import interpreter_shim
from interpreter_sanitizer import Report, sanitized

interpreter_shim.install()

WITH_KERNEL = [op for op in OPS.values() if op.name in backend.TRITON_OPS]
WITH_GRADIENTS = [op for op in WITH_KERNEL if op.cases[0].gradients]
PAIRS = [(op, case) for op in WITH_KERNEL for case in op.cases if not case.large]
# Many programs of one kind: in one type, and not again in another order or through a compiler.
SLOW = {"many_rows", "several_blocks", "several_blocks_per_sequence", "several_chunks", "widest"}
QUICK = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op, case in PAIRS if case.name not in SLOW]
CASES = [
    pytest.param(op, case, dtype, id=f"{op.name}-{case.name}-{dtype}")
    for op, case in PAIRS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype == torch.float32 or case.name not in SLOW
]


def _options(case: Case) -> frozenset:
    """Which arguments a case gives, of which rank, with which options: cases that agree compile to one graph."""
    built = case.arguments(torch.float32)
    return frozenset((k, v.dim() if isinstance(v, torch.Tensor) else v) for k, v in built.items())


WITH_INCOMING_GRADIENT = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op, case in PAIRS
    if case.name not in SLOW and case.gradients
]
KINDS = {
    (op.name, _options(case)): pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op, case in reversed(PAIRS)
    if case.name not in SLOW
}
# Every gradient in float32 agrees with float64 autograd to this share of its largest value.
FLOAT32_GRADIENT = 1e-5


def watched(op, case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, torch.Tensor], Report]:
    """The results of a case by the op's kernel, under the sanitizer, with guarded inputs."""
    arguments = case.arguments(dtype)
    with backend.using("triton"), sanitized(seed) as report:
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                arguments[name] = report.guarded(value, name)
        return run(op.door, arguments, case.gradients), report


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_kernel_matches_reference(op, case, dtype):
    got, report = watched(op, case, dtype)
    wanted = expected(op.reference, case, case.arguments(dtype))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(f"{op.name} {case.name} {name}", got[name], value.want, allowed=value.allowed)
        if dtype == torch.float32 and name.startswith("d_"):
            limit = FLOAT32_GRADIENT * float(value.want.abs().max()) if value.want.numel() else 0.0
            assert_close(f"{op.name} {case.name} {name}, 1e-5 relative", got[name], value.want, allowed=limit)
    for launched in report.runs:
        assert not any(launched.unwritten.values()), f"{launched.kernel} left elements unwritten: {launched.unwritten}"


@pytest.mark.parametrize(("op", "case"), QUICK)
def test_order_of_programs_does_not_matter(op, case):
    first, second = (watched(op, case, torch.bfloat16, seed)[0] for seed in (1, 2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{op.name} {case.name} {name} depends on the order of programs"


@pytest.mark.parametrize(("op", "case"), list(KINDS.values()))
def test_compiled_gives_the_same_bits(op, case):
    arguments = case.arguments(torch.bfloat16)
    torch._dynamo.reset()
    with backend.using("triton"):
        want = run(op.door, arguments, case.gradients)
        compiled = torch.compile(op.door, fullgraph=True, dynamic=True, backend="aot_eager")
        got = run(compiled, arguments, case.gradients)
    for name, value in want.items():
        assert torch.equal(got[name], value), f"{op.name} {case.name} {name} differs when compiled"


@pytest.mark.parametrize("op", WITH_GRADIENTS, ids=lambda op: op.name)
@pytest.mark.parametrize("choice", ["triton", "auto"])
def test_recomputing_in_the_backward_gives_the_same_bits(op, choice):
    """Activation checkpointing, which gives up what was saved at the first reading."""
    case = op.cases[1]
    arguments = case.arguments(torch.float32)

    def recomputed(**given):
        return checkpoint(op.door, use_reentrant=False, **given)

    with backend.using(choice):
        want = run(op.door, arguments, case.gradients)
        got = run(recomputed, arguments, case.gradients)
    for name, value in want.items():
        assert torch.equal(got[name], value), f"{op.name} {case.name} {name} differs when recomputed"


@pytest.mark.parametrize("op", WITH_GRADIENTS, ids=lambda op: op.name)
def test_a_compiler_sees_one_op(op):
    """Dispatcher-visible, forward and backward, and nothing else of the kernel's insides."""
    case = op.cases[1]
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with backend.using("triton"):
        spy = aot_autograd(fw_compiler=make_boxed_compiler(keep), bw_compiler=make_boxed_compiler(keep))
        compiled = torch.compile(op.door, fullgraph=True, backend=spy)
        run(compiled, case.arguments(torch.float32), case.gradients)
    ours = [[str(node.target) for node in graph.graph.nodes if "gristmill" in str(node.target)] for graph in graphs]
    assert [len(names) for names in ours] == [1, 1], f"expected one op forward and one backward, but got {ours}"


def test_library_ops_keep_torch_s_rules():
    """Schemas, fake results and autograd registrations, by PyTorch's own checker."""
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    r = torch.randn(3, 8, requires_grad=True)
    cos, sin = torch.randn(3, 4), torch.randn(3, 4)
    q, k = torch.randn(3, 2, 8, requires_grad=True), torch.randn(3, 1, 8, requires_grad=True)
    hidden, targets = torch.randn(5, 8, requires_grad=True), torch.tensor([0, 1, 2, -100, 3])
    vocabulary = torch.randn(7, 8, requires_grad=True)
    heads = [torch.randn(1, 5, n, 8, requires_grad=True) for n in (4, 2, 2)]
    expert_rows, bias = (torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, 6)), torch.randn(3, 6)
    tokens = torch.randn(4, 8, requires_grad=True), torch.randint(3, (4, 2)), torch.rand(4, 2, requires_grad=True)
    w_gate_up, w_down = torch.randn(3, 8, 6, requires_grad=True), torch.randn(3, 3, 8, requires_grad=True)
    for op in WITH_KERNEL:
        backend.triton_kernel(op.name)
    ops, options = torch.ops.gristmill, (-100, 1e-3, 5.0, 0.1)
    for called, arguments in [
        (ops.rms_norm, (x, w, 1e-5, 0.0)),
        (ops.add_rms_norm, (x, r, w, 1e-5, 1.0)),
        (ops.rope, (q, k, cos, sin, None, False)),
        (ops.swiglu, (x, 1.702, 7.0, True)),
        (ops.attention, (*heads, torch.randn(4, requires_grad=True), None, 3, 0.3)),
        (ops.attention, (*heads, None, torch.tensor([0, 2, 5]), None, 0.3)),
        (ops.grouped_matmul, (*expert_rows, torch.tensor([2, 2, 4]), bias)),
        (ops.moe, (*tokens, w_gate_up, w_down, bias, None, 1.702, 7.0, True, True)),
        (ops.linear_cross_entropy, (hidden, vocabulary, targets, *options, True, True, True)),
        (ops.linear_cross_entropy_rows, (hidden, vocabulary, targets, *options)),
    ]:
        results = torch.library.opcheck(called.default, arguments, raise_exception=False)
        assert set(results.values()) == {"SUCCESS"}, f"{called}: {results}"


@pytest.mark.parametrize(("op", "case"), WITH_INCOMING_GRADIENT)
def test_incoming_gradient_may_be_expanded(op, case):
    """out.sum().backward() hands down a gradient whose strides are all zero."""
    arguments = case.arguments(torch.float32)

    def gradients(function):
        leaves = {name: arguments[name].detach().requires_grad_() for name in case.gradients}
        result = function(**(arguments | leaves))
        outputs = result if isinstance(result, tuple) else (result,)
        torch.stack([out.sum() for out in outputs]).sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    with backend.using("triton"):
        got = gradients(op.door)
    for name, value in gradients(op.reference).items():
        assert_close(f"{op.name} {case.name} d_{name}", got[name], value, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("op", WITH_GRADIENTS, ids=lambda op: op.name)
def test_one_output_or_one_argument_may_be_without_gradient(op):
    case = next(case for case in op.cases if len(case.gradients) > 1) if op.name != "swiglu" else op.cases[0]
    arguments = case.arguments(torch.float32)
    want = run(op.reference, arguments, case.gradients)
    for name in case.gradients:
        with backend.using("triton"):
            got = run(op.door, arguments, (name,))
        assert_close(f"{op.name} d_{name} alone", got[f"d_{name}"], want[f"d_{name}"], atol=2e-5, rtol=2e-5)


def test_one_of_two_outputs_used():
    for name in ("rms_norm", "rope"):
        op = OPS[name]
        case = next(case for case in op.cases if case.name in ("residual", "odd") and len(case.gradients) > 1)
        if name == "rms_norm":
            case = next(case for case in op.cases if case.name == "residual")
        arguments = case.arguments(torch.float32)
        for index in (0, 1):

            def one(function, index=index, arguments=arguments):
                return lambda **given: function(**given)[index]

            leaves = tuple(n for n in case.gradients if name == "rms_norm" or n == "qk"[index])
            leaves = tuple(n for n in leaves if not (name == "rms_norm" and index == 1 and n == "weight"))
            want = run(one(op.reference), arguments, leaves)
            with backend.using("triton"):
                got = run(one(op.door), arguments, leaves)
            for key, value in want.items():
                assert_close(f"{name} output {index} {key}", got[key], value, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("op", WITH_GRADIENTS, ids=lambda op: op.name)
def test_no_rows(op):
    """An empty batch gives empty results, and gradients of zero."""
    empty = {
        "rms_norm": {"x": torch.empty(0, 8), "weight": torch.ones(8)},
        "rope": {
            "q": torch.empty(0, 2, 8),
            "k": torch.empty(0, 1, 8),
            "cos": torch.empty(0, 4),
            "sin": torch.empty(0, 4),
        },
        "swiglu": {"gate_up": torch.empty(0, 8)},
        "attention": {name: torch.empty(1, 0, 2, 8) for name in "qkv"},
        "grouped_matmul": {
            "x": torch.empty(0, 8),
            "w": torch.ones(2, 8, 6),
            "offsets": torch.zeros(2, dtype=torch.int32),
            "bias": torch.ones(2, 6),
        },
        "moe": {
            "x": torch.empty(0, 8),
            "expert_ids": torch.empty(0, 2, dtype=torch.int64),
            "expert_weights": torch.empty(0, 2),
            "w_gate_up": torch.ones(3, 8, 8),
            "w_down": torch.ones(3, 4, 8),
            "b_gate_up": torch.ones(3, 8),
            "b_down": torch.ones(3, 8),
        },
        "linear_cross_entropy": {
            "hidden": torch.empty(0, 8),
            "weight": torch.ones(5, 8),
            "targets": torch.empty(0, dtype=torch.int64),
        },
    }[op.name]
    gradients = tuple(name for name in op.cases[0].gradients if name in empty)
    want = run(op.reference, empty, gradients)
    with backend.using("triton"):
        got = run(op.door, empty, gradients)
    for name, value in want.items():
        assert_close(f"{op.name} {name}", got[name], value)


def test_positions_outside_of_the_table_give_nan():
    """On a GPU nobody can ask without waiting; neither may anybody read what lies around the table."""
    q, k, table = torch.randn(5, 2, 12), torch.randn(5, 1, 12), torch.randn(3, 6)
    positions = torch.tensor([0, -1, 2, 3, 1])
    with backend.using("triton"), sanitized():
        for out in OPS["rope"].door(q, k, table, table, positions=positions):
            assert out.isnan().any(-1).any(-1).tolist() == [False, True, False, True, False]


def test_targets_outside_of_the_vocabulary_give_nan():
    from grist_kernels.linear_cross_entropy.cross_entropy_kernel import cross_entropy_

    logits, targets = torch.randn(4, 7), torch.tensor([6, 7, -1, -100])
    losses, lse = torch.empty(4), torch.empty(4)
    options = {"ignore_index": -100, "z_loss": 0.0, "softcap": None, "label_smoothing": 0.0}
    with sanitized():
        cross_entropy_(logits, targets, losses, lse, None, with_loss=True, with_gradient=True, **options)
    assert losses.isnan().tolist() == [False, True, True, False]
    assert losses[3] == 0
    assert not logits[3].any()
