"""Offsets beyond 2**31 elements: a 32-bit product anywhere would read and write the wrong memory of a large model.

Strides are chosen so that each fits into 32 bits while a row's number times its stride does not; the memory is virtual. The
sanitizer raises IntegerOverflow at the first product that wraps, and finds every address that is no element.
"""

from __future__ import annotations

import pytest
import torch
from assertions import assert_close
from torch import Tensor

from grist_kernels import OPS, backend, launch
from grist_kernels.cases import run

pytest.importorskip("triton")
if not backend.INTERPRETING:
    pytest.skip("needs TRITON_INTERPRET=1, and triton not yet imported without it", allow_module_level=True)

from interpreter_memory import sparse_strided
from interpreter_sanitizer import ends, sanitized

BIG = 2**30  # a stride; two of them leave 32 bits
LONG_ROWS = 2**19 + 3  # of 4,096 elements: the last rows begin beyond 2**31


def strided(shape: tuple[int, ...], strides: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random float32 values in virtual memory."""
    tensor = sparse_strided(shape, strides, torch.float32)
    return tensor.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def long_rows(width: int = 4096, seed: int = 0) -> Tensor:
    """(LONG_ROWS, width) without gaps; the first and the last three rows are random, the others zero."""
    tensor = sparse_strided((LONG_ROWS, width), (width, 1), torch.float32)
    for rows in (slice(None, 3), slice(-3, None)):
        tensor[rows] = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    return tensor


def compare(name: str, arguments: dict, gradients: tuple[str, ...]) -> None:
    """An op on strided arguments against the reference on compact copies."""
    op = OPS[name]
    compact = {
        key: value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
        for key, value in arguments.items()
    }
    want = run(op.reference, compact, gradients)
    with backend.using("triton"), sanitized():
        got = run(op.door, arguments, gradients)
    for key, value in want.items():
        assert_close(f"{name} {key}", got[key], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "strides"), [((3, 64), (BIG, 1)), ((2, 3, 64), (64, BIG, 1)), ((3, 2, 64), (BIG, 64, 1))]
)
def test_rms_norm_rows_far_apart(shape, strides):
    residual = strided(shape, strides, seed=1)
    compare("rms_norm", {"x": strided(shape, strides), "weight": torch.randn(64)}, ("x", "weight"))
    arguments = {"x": strided(shape, strides), "weight": torch.randn(64), "residual": residual}
    compare("rms_norm", arguments, ("x", "weight", "residual"))


def test_rms_norm_gradients_far_apart():
    from grist_kernels.rms_norm.triton_kernel import _launch_backward

    x, dy, dsum = (strided((2, 3, 64), (64, BIG, 1), seed) for seed in range(3))
    weight, rstd = torch.randn(64), torch.rand(6)
    with sanitized():
        far = _launch_backward(dy, dsum, x, weight, rstd, 0.0, True)
        near = _launch_backward(dy.clone(), dsum.clone(), x.clone(), weight, rstd, 0.0, True)
    for got, want in zip(far, near, strict=True):
        assert torch.equal(got, want)


def test_rms_norm_many_rows(monkeypatch):
    """Outputs, and the float32 partial sums of as many programs, beyond 2**31 elements."""
    from grist_kernels import column_sums
    from grist_kernels.rms_norm import triton_kernel

    x, dy, weight = long_rows(), long_rows(seed=1), torch.randn(4096)
    rows = [0, LONG_ROWS - 1]
    with sanitized(programs=ends(2)):
        y, total, _ = triton_kernel._launch_forward(x, x, weight, 1e-5, 0.0)
    want = OPS["rms_norm"].reference(x[rows], weight, 1e-5, x[rows])
    assert_close("y", y[rows], want[0], atol=1e-5)
    assert_close("sum", total[rows], want[1], atol=1e-5)

    started = []
    start = launch.run

    def all_but_the_sum(kernel, *arguments, **constants):
        """The sum over half a million partial rows takes the interpreter long; it has a test of its own."""
        started.append(arguments)
        if kernel is not column_sums._reduce_kernel:
            start(kernel, *arguments, **constants)

    monkeypatch.setattr(launch, "run", all_but_the_sum)
    leaf = x[rows].requires_grad_()
    want = OPS["rms_norm"].reference(leaf, weight)
    (d_want,) = torch.autograd.grad(want, leaf, dy[rows])
    rstd = torch.ones(LONG_ROWS)
    rstd[rows] = torch.rsqrt(x[rows].square().mean(-1) + 1e-5)
    with launch.assuming(launch.Target("sm_90", LONG_ROWS)), sanitized(programs=ends(1)):
        dx, _ = triton_kernel._launch_backward(dy, dy, x, weight, rstd, 0.0, True)
    partial = started[-1][2]
    assert partial.shape == x.shape, "expected as many programs as rows"
    assert_close("dx", dx[rows], d_want + dy[rows], atol=1e-5)
    assert_close("partial dweight", partial[rows], dy[rows] * x[rows] * rstd[rows][:, None], atol=1e-5)


def test_sums_of_many_columns():
    from grist_kernels.column_sums import _reduce_kernel

    D, n_partials = 2**20, 2049
    partial = sparse_strided((n_partials, D), (D, 1), torch.float32)
    partial[:, -32:] = torch.randn(n_partials, 32)
    dweight = torch.zeros(D)
    grid = (D // 32,)
    with sanitized(programs=ends(1)):
        launch.run(_reduce_kernel, grid, dweight.device, partial, dweight, n_partials, D, ROWS=256, BLOCK=32)
    assert_close("dweight", dweight[-32:], partial[:, -32:].sum(0), atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rope_batches_tokens_or_heads_far_apart(axis):
    shape = [2, 2, 2, 16]
    shape[axis] = 3
    strides = [256, 64, 16, 1]
    strides[axis] = BIG
    angle = torch.rand(shape[1], 8) * 6
    q, k = (strided(tuple(shape), tuple(strides), seed) for seed in (0, 1))
    compare("rope", {"q": q, "k": k, "cos": angle.cos(), "sin": angle.sin()}, ("q", "k"))


def test_rope_tables_far_apart():
    angle = torch.rand(3, 8) * 6
    cos, sin = (sparse_strided((3, 8), (BIG, 1), torch.float32).copy_(table) for table in (angle.cos(), angle.sin()))
    q, k = torch.randn(3, 2, 16), torch.randn(3, 1, 16)
    compare("rope", {"q": q, "k": k, "cos": cos, "sin": sin}, ("q", "k"))
    positions = torch.tensor([2, 0, 1])
    compare("rope", {"q": q, "k": k, "cos": cos, "sin": sin, "positions": positions}, ("q", "k"))
    cos, sin = (
        table[None].transpose(0, 1) for table in (cos, sin)
    )  # (3, 1, 8): the same tables, one for each sequence
    compare("rope", {"q": q[:, None], "k": k[:, None], "cos": cos, "sin": sin}, ("q", "k"))


def test_rope_many_tokens():
    N, H = 32, 128
    q = long_rows(N * H).view(LONG_ROWS, N, H)
    k = q[:, :8]
    cos, sin = (torch.rand(LONG_ROWS, 1).expand(LONG_ROWS, H // 2) for _ in range(2))

    def last_tokens(programs: int) -> range:
        """Of every block of heads: four for the queries, one for the keys."""
        return range(programs // 5 - 1, programs, programs // 5)

    with backend.using("triton"), sanitized(programs=last_tokens):
        got = OPS["rope"].door(q, k, cos, sin)
    want = OPS["rope"].reference(q[-2:], k[-2:], cos[-2:], sin[-2:])
    for name, out, wanted in zip("qk", got, want, strict=True):
        assert_close(name, out[-2:], wanted, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"interleaved": True, "alpha": 1.702, "limit": 7.0}], ids=["halves", "gpt_oss"]
)
def test_swiglu_rows_far_apart(options):
    compare("swiglu", {"gate_up": strided((3, 64), (BIG, 1)), **options}, ("gate_up",))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_swiglu_many_rows(interleaved):
    from grist_kernels.swiglu.triton_kernel import _backward, _forward

    gate_up, d_out = long_rows(8192), long_rows(4096, seed=1)
    with sanitized(programs=ends(4)):
        out = _forward(gate_up, None, None, interleaved)
        dx = _backward(d_out, gate_up, None, None, interleaved)
    rows = [0, LONG_ROWS - 1]
    leaf = gate_up[rows].requires_grad_()
    want = OPS["swiglu"].reference(leaf, interleaved=interleaved)
    (d_want,) = torch.autograd.grad(want, leaf, d_out[rows])
    assert_close("out", out[rows], want, atol=1e-5)
    assert_close("d_gate_up", dx[rows], d_want, atol=1e-5)


def test_logits_of_many_rows_times_a_wide_vocabulary():
    from grist_kernels.linear_cross_entropy.cross_entropy_kernel import cross_entropy_

    logits, targets = strided((3, 100), (BIG, 1)), torch.tensor([5, 99, 0])
    want = logits.clone().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(want, targets, reduction="none")
    (d_want,) = torch.autograd.grad(loss.sum(), want)
    losses, lse = torch.empty(3), torch.empty(3)
    options = {"ignore_index": -100, "z_loss": 0.0, "softcap": None, "label_smoothing": 0.0}
    with sanitized():
        cross_entropy_(logits, targets, losses, lse, None, with_loss=True, with_gradient=True, **options)
    assert_close("loss", losses, loss.float(), atol=1e-5)
    assert_close("d_logits", logits, d_want.float(), atol=1e-6)


@pytest.mark.parametrize("strides", [(BIG, 16, 1), (16, BIG, 1), (16, 1, BIG)], ids=["experts", "rows", "columns"])
def test_grouped_matmul_operands_far_apart(strides):
    arguments = {
        "x": strided((7, 16), (BIG, 1)),
        "w": strided((3, 16, 16), strides, seed=1),
        "offsets": torch.tensor([2, 2, 6]),
        "bias": strided((3, 16), (BIG, 1), seed=2),
    }
    compare("grouped_matmul", arguments, ("x", "w", "bias"))


@pytest.mark.parametrize("strides", [(BIG, 16, 1), (16, BIG, 1), (16, 1, BIG)], ids=["experts", "rows", "columns"])
def test_moe_operands_far_apart(strides):
    bias_strides = (1, BIG) if strides[2] == BIG else (BIG, 1)
    arguments = {
        "x": strided((5, 16), (BIG, 1)),
        "expert_ids": torch.tensor([[0, 2], [2, 1], [2, 0], [0, 1], [1, 2]], dtype=torch.int32),
        "expert_weights": torch.rand(5, 2),
        "w_gate_up": strided((3, 16, 16), strides, seed=1),
        "w_down": strided((3, 8, 16), strides, seed=2),
        "b_gate_up": strided((3, 16), bias_strides, seed=3),
        "b_down": strided((3, 16), bias_strides, seed=4),
    }
    compare("moe", arguments, ("x", "expert_weights", "w_gate_up", "w_down", "b_gate_up", "b_down"))


def one_expert(rows: int):
    """Routing and schedule of one expert that has all rows, in order."""
    from grist_kernels.expert_rows import Routing, schedule

    order, ends = torch.arange(rows, dtype=torch.int32), torch.tensor([rows], dtype=torch.int32)
    return Routing(order, order, ends), schedule(ends, rows, 128)


def test_moe_forward_of_many_rows():
    """Rows' inputs, hidden values and activations beyond 2**31 elements; the last two programs are the last rows'."""
    from grist_kernels.grouped_matmul import triton_kernel as grouped
    from grist_kernels.moe import triton_kernel

    (routing, tiles), options = one_expert(LONG_ROWS), triton_kernel._options(None, None, False)
    x, w_gate_up, w_down = torch.zeros(LONG_ROWS, 16), torch.randn(1, 16, 8192), torch.randn(1, 4096, 16)
    x[-3:] = torch.randn(3, 16)
    with sanitized(programs=ends(2)):
        h, act = triton_kernel._gate_up(x, w_gate_up, None, 1, routing, tiles, 128, True, options)
        narrow = grouped.multiply(long_rows(), w_down, None, tiles, 128)
    want = x[-3:] @ w_gate_up[0]
    block = 16  # columns at the end, which the last programs make
    for name, got, wanted in (
        ("gates", h[-3:, :4096], want[:, :4096]),
        ("ups", h[-3:], want),
        ("act", act[-3:], OPS["swiglu"].reference(want)),
    ):
        assert_close(name, got[:, -block:], wanted[:, -block:], atol=1e-4)
    assert_close("narrow", narrow[-3:], long_rows()[-3:] @ w_down[0], atol=1e-3)


def test_moe_backward_of_many_rows():
    from grist_kernels.moe import triton_kernel

    (routing, tiles), options = one_expert(LONG_ROWS), triton_kernel._options(None, None, False)
    d_out, w_down, h = torch.zeros(LONG_ROWS, 16), torch.randn(1, 4096, 16), long_rows(8192)
    d_out[-3:] = torch.randn(3, 16)
    weights = torch.full((LONG_ROWS,), 2.0)
    with sanitized(programs=ends(2)):
        d_h, act, _ = triton_kernel._d_hidden(d_out, w_down, h, weights, routing, tiles, 128, options)
    last = h[-3:].clone().requires_grad_()
    activated = OPS["swiglu"].reference(last)
    (want,) = torch.autograd.grad(activated, last, 2.0 * d_out[-3:] @ w_down[0].T)
    assert_close("d_h", d_h[-3:, -16:], want[:, -16:], atol=1e-4)
    assert_close("activation", act[-3:, -16:], 2.0 * activated.detach()[:, -16:], atol=1e-4)


def test_moe_gradients_far_apart():
    from grist_kernels.moe import triton_kernel

    x, d_out = strided((5, 16), (BIG, 1)), strided((5, 16), (BIG, 1), seed=1)
    ids, weights = torch.tensor([[0, 2], [2, 1], [2, 0], [0, 1], [1, 2]]), torch.rand(5, 2)
    w_gate_up, w_down, b_down = torch.randn(3, 16, 16), torch.randn(3, 8, 16), torch.randn(3, 16)
    options = (None, None, False)
    _, *kept = triton_kernel._forward(x, ids, weights, w_gate_up, w_down, None, b_down, *options, True)

    def gradients(d_out: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        arguments = [d_out, x, ids, weights, w_gate_up, w_down, b_down, *kept, *options, False]
        return triton_kernel._backward(*arguments)

    near = gradients(d_out.contiguous(), x.contiguous())
    far = gradients(d_out, x)
    with sanitized():
        watched = gradients(d_out, x)
    for got, want, seen in zip(far, near, watched, strict=True):
        assert torch.equal(got, want)
        assert torch.equal(seen, want)


def test_rows_far_apart_are_combined():
    from grist_kernels.moe.triton_kernel import _combine

    rows = long_rows()
    with sanitized():
        out = _combine(rows, torch.tensor([LONG_ROWS - 1, 0], dtype=torch.int32), 2, 1, None)
    assert_close("out", out, rows[[LONG_ROWS - 1, 0]])
    with sanitized(programs=ends(1)):
        out = _combine(rows, torch.full((LONG_ROWS,), 2, dtype=torch.int32), LONG_ROWS, 1, None)
    assert_close("last", out[-1, -64:], rows[2, -64:])


def test_gradients_of_many_experts():
    """Weights' gradients beyond 2**31 elements."""
    from grist_kernels.grouped_matmul.triton_kernel import outer

    x, dy, experts = torch.randn(4, 2048), torch.randn(4, 2048), 513
    starts = torch.zeros(experts + 1, dtype=torch.int32)
    starts[-1] = 4
    with sanitized(programs=ends(1)):
        dw = outer(x, dy, starts, experts, 16)
    assert_close("dw", dw[-1, -32:, -32:], (x.T @ dy)[-32:, -32:], atol=1e-4)
