"""How many kernels an op launches and how many storages it takes: below a hundred microseconds these are the time.

A GPU is not needed to count, and a launch or an allocation too many is a change that a timing on a busy machine would miss.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grist_kernels import OPS, backend

pytest.importorskip("triton")
if not backend.INTERPRETING:
    pytest.skip("needs TRITON_INTERPRET=1, and triton not yet imported without it", allow_module_level=True)

from interpreter_sanitizer import sanitized

# Of one call: (kernels launched, matrix products of the vendor's library, storages allocated), forward and backward.
COUNTS = {
    ("rms_norm", "odd"): ((1, 0, 2), (2, 0, 3)),  # y, rstd; dx, partial sums, dweight
    ("rms_norm", "residual"): ((1, 0, 3), (2, 0, 3)),
    ("rms_norm", "heads_of_qkv"): ((1, 0, 2), (2, 0, 3)),  # a view is read where it lies
    ("rope", "odd"): ((1, 0, 2), (1, 0, 2)),
    ("rope", "views_of_qkv"): ((1, 0, 2), (1, 0, 2)),
    ("rope", "heads_first"): ((1, 0, 2), (1, 0, 2)),
    ("swiglu", "gpt_oss"): ((1, 0, 1), (1, 0, 1)),
    ("swiglu", "strided"): ((1, 0, 1), (1, 0, 1)),
    ("attention", "odd"): ((1, 0, 3), (2, 0, 5)),  # out, lse, no bounds; dq, dk, dv, delta, no d_sinks
    ("attention", "window_and_sinks"): ((1, 0, 3), (3, 0, 6)),  # d_sinks: a share of each program, and their sum
    ("attention", "packed"): ((2, 0, 3), (2, 0, 5)),  # the bounds of every token
    ("attention", "views_of_qkv"): ((1, 0, 3), (2, 0, 5)),
    # starts of experts, expert and first row of each tile; the product; the same again, dx, dw, dbias
    ("grouped_matmul", "odd"): ((2, 0, 4), (4, 0, 6)),
    ("grouped_matmul", "aligned"): ((2, 0, 4), (3, 0, 6)),
    # place, pair, ends; starts and tiles; h, activation, y, out. Starts and tiles; d_h, activation, shares of d_weights; its
    # sums; d_w_down, d_b_down, d_w_gate_up, d_b_gate_up (empty if none), gradients of rows, d_x
    ("moe", "gpt_oss"): ((5, 0, 10), (9, 0, 13)),
    ("moe", "no_bias"): ((5, 0, 10), (7, 0, 13)),
    # logits, losses, lse, loss, factor, d_hidden, d_weight; the backward scales what the forward made
    ("linear_cross_entropy", "odd"): ((2, 3, 7), (0, 0, 3)),
    # no gradient is made before its factors are known: logits, losses, lse; logits, d_hidden, d_weight
    ("linear_cross_entropy", "none"): ((1, 1, 3), (1, 3, 3)),
}
MOST_FORWARD, MOST_BACKWARD = 2, 3  # launches of ours in a call of one chunk


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


def counted(work) -> tuple[Any, tuple[int, int, int]]:
    with sanitized() as report, Products() as products:
        result = work()
    return result, (len(report.launches), products.count, report.allocations)


@pytest.mark.parametrize(("op", "name"), [pytest.param(*key, id="-".join(key)) for key in COUNTS])
def test_launches_and_allocations(op, name):
    case = next(case for case in OPS[op].cases if case.name == name)
    arguments = case.arguments(torch.float32)
    leaves = [arguments[key].requires_grad_() for key in case.gradients]
    with backend.using("triton"):
        if op == "linear_cross_entropy":  # the door also looks at the targets, on a CPU only
            call, options = backend.triton_kernel(op).linear_cross_entropy, {
                "ignore_index": -100, "z_loss": 0.0, "softcap": None, "label_smoothing": 0.0, "reduction": "mean"
            }  # fmt: skip
            arguments = options | arguments
        else:
            call = OPS[op].door
        result, forward = counted(lambda: call(**arguments))
        outputs = result if isinstance(result, tuple) else (result,)
        d_outputs = [torch.randn_like(out) for out in outputs]
        _, backward = counted(lambda: torch.autograd.grad(outputs, leaves, d_outputs))
    assert (forward, backward) == COUNTS[op, name]
    if op not in ("moe", "grouped_matmul"):  # several products each; COUNTS alone holds them
        assert forward[0] <= MOST_FORWARD
        assert backward[0] <= MOST_BACKWARD


def test_every_op_with_a_kernel_is_counted():
    # Without gradients: test_triton_decode.py, test_triton_moe_mxfp4.py, test_triton_quantized_linear.py.
    elsewhere = {"decode_attention", "moe_mxfp4", "quantized_linear"}
    assert {op for op, _ in COUNTS} == set(backend.TRITON_OPS) - elsewhere


def test_evaluation_makes_no_gradients():
    """Without gradients the loss is one product and two launches, whatever the reduction."""
    case = next(case for case in OPS["linear_cross_entropy"].cases if case.name == "odd")
    arguments = case.arguments(torch.float32)
    with backend.using("triton"), torch.no_grad():
        _, (launches, products, _) = counted(lambda: OPS["linear_cross_entropy"].door(**arguments))
    assert (launches, products) == (2, 1)
