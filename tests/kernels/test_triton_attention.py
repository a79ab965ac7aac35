"""The attention kernels in the watched interpreter: shapes, windows, sinks, groups and documents against each other, and what
must be true exactly: nobody sees the future, what lies behind the window, or another document."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from assertions import assert_close

from grist_kernels import OPS, attention, backend
from grist_kernels.attention import launches
from grist_kernels.cases import Case, expected, normal, run
from grist_tools.kernel_recorder import recorded

pytest.importorskip("triton")
if not backend.INTERPRETING:
    pytest.skip("needs TRITON_INTERPRET=1, and triton not yet imported without it", allow_module_level=True)

import interpreter_shim
from interpreter_memory import sparse_strided
from interpreter_sanitizer import sanitized

interpreter_shim.install()

TIMES, GROUPS, WINDOWS, WIDTHS = (1, 17, 63, 64, 129, 200), (1, 4, 8), (None, 1, 5, 64, "T"), (16, 64, 80, 128)
DOCUMENTS = [1, 0, 5, 64, 130]


def _grid() -> list[tuple]:
    """Every pair of values of any two settings occurs, without the whole product of 720."""
    settings = [TIMES, GROUPS, WINDOWS, (False, True), WIDTHS]
    missing = {
        (i, a, j, b)
        for (i, first), (j, second) in itertools.combinations(enumerate(settings), 2)
        for a in first
        for b in second
    }

    def pairs(point: tuple) -> set:
        return {(i, point[i], j, point[j]) for i, j in itertools.combinations(range(len(settings)), 2)}

    found = []
    while missing:
        best = max(itertools.product(*settings), key=lambda point: len(pairs(point) & missing))
        found.append(best)
        missing -= pairs(best)
    return found


def _case(T: int, group: int, window, sinks: bool, H: int, documents: list[int] | None = None) -> Case:
    def build(generator):
        shape = (T,) if documents else (1, T)
        arguments = {
            "q": normal(generator, *shape, group, H),
            "window": T if window == "T" else window,
            "return_lse": True,
        }
        arguments |= {name: normal(generator, *shape, 1, H) for name in ("k", "v")}
        if sinks:
            arguments["sinks"] = normal(generator, group)
        if documents:
            arguments["cu_seqlens"] = torch.tensor([0, *documents]).cumsum(0).int()
        return arguments

    return Case("grid", build, ("q", "k", "v", *(("sinks",) if sinks else ())))


def _check(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    with backend.using("triton"), sanitized() as report:
        guarded = {
            name: report.guarded(value, name) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        got = run(attention, guarded, case.gradients)
    for name, value in expected(OPS["attention"].reference, case, arguments).items():
        # One key and no sink: the gradient of the query is zero, and a difference of two equal sums is nearly that.
        allowed = value.allowed if value.want.any() else 4 * torch.finfo(dtype).eps
        assert_close(name, got[name], value.want, allowed=allowed)
    for launched in report.runs:
        assert not any(launched.unwritten.values()), f"{launched.kernel} left elements unwritten: {launched.unwritten}"


@pytest.mark.parametrize(("T", "group", "window", "sinks", "H"), _grid())
def test_every_pair_of_settings(T, group, window, sinks, H):
    _check(_case(T, group, window, sinks, H), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 64])
def test_documents(window, dtype):
    _check(_case(200, 4, window, True, 64, DOCUMENTS), dtype)


def test_a_narrow_window_has_launches_of_its_own():
    assert launches.row_name("dq", None) == launches.row_name("dq", launches.NARROW_WINDOW + 1) == "dq"
    assert launches.row_name("dq", launches.NARROW_WINDOW) == "dq_window"
    q = torch.empty(1, 4096, 64, 64, dtype=torch.bfloat16, device="meta")
    grids = {}
    for window in (None, 128):
        with backend.using("triton"), recorded() as made:
            attention(q, q[:, :, :8], q[:, :, :8], window=window)
        grids[window] = made[0].grid
    assert grids == {None: (64, 32), 128: (64, 64)}  # blocks of 128 queries, and of 64


def test_one_visible_key_and_a_sink():
    """Without a sink the softmax of one key is 1 whatever the query; with one it is not, and the query has a gradient."""
    q, k, v = (torch.randn(1, 3, 2, 16, requires_grad=True) for _ in range(3))
    sinks = torch.randn(2, requires_grad=True)
    with backend.using("triton"):
        (dq,) = torch.autograd.grad(attention(q, k, v, window=1).square().sum(), q)
        assert_close("dq without sinks", dq, torch.zeros_like(dq), atol=1e-5)
        out = attention(q, k, v, window=1, sinks=sinks)
        dq, d_sinks = torch.autograd.grad(out.square().sum(), (q, sinks))
    want = torch.sigmoid((q * k).sum(-1) / 4 - sinks).unsqueeze(-1) * v
    dq_want, d_sinks_want = torch.autograd.grad(want.square().sum(), (q, sinks))
    assert dq_want.abs().min() > 0
    assert_close("dq", dq, dq_want, atol=1e-5)
    assert_close("d_sinks", d_sinks, d_sinks_want, atol=1e-5)


@pytest.mark.parametrize(("window", "documents"), [(None, None), (20, None), (None, [40, 90, 70]), (20, [40, 90, 70])])
def test_what_is_not_seen_has_no_influence(window, documents):
    """Other values there, NaN too, leave the same bits, forward and backward."""
    T, query = 200, 120
    first = 0 if documents is None else 40
    seen = slice(max(first, 0 if window is None else query - window + 1), query + 1)
    q, k, v = (torch.randn(1, T, heads, 32) for heads in (4, 2, 2))
    options = {"window": window, "sinks": torch.randn(4)}
    if documents:
        options["cu_seqlens"] = torch.tensor([0, *documents]).cumsum(0).int()
        q, k, v = q[0], k[0], v[0]
    time = 0 if documents else 1

    def of_query(k, v):
        leaf = q.clone().requires_grad_()
        with backend.using("triton"):
            out = attention(leaf, k, v, **options).select(time, query)
            (dq,) = torch.autograd.grad(out.square().sum(), leaf)
        return out.detach(), dq.select(time, query)

    before = of_query(k, v)
    other_k, other_v = torch.randn_like(k), torch.randn_like(v)
    for new, old in ((other_k, k), (other_v, v)):
        new.narrow(time, seen.start, seen.stop - seen.start).copy_(old.narrow(time, seen.start, seen.stop - seen.start))
    for got, want in zip(of_query(other_k, other_v), before, strict=True):
        assert torch.equal(got, want)
    with backend.using("triton"):  # and keys that the query does not see get no gradient from it
        leaf = k.clone().requires_grad_()
        out = attention(q, leaf, v, **options).select(time, query)
        (dk,) = torch.autograd.grad(out.square().sum(), leaf)
    outside = torch.ones(T, dtype=torch.bool)
    outside[seen] = False
    assert not dk.movedim(time, 0)[outside].any()


@pytest.mark.parametrize("axis", [0, 2])
def test_batches_or_heads_far_apart(axis):
    """Strides whose products leave 32 bits. (Tokens that far apart are copied: a tile's own offsets are 32 bits wide.)"""
    shape, strides = [2, 17, 2, 16], [17 * 32, 32, 16, 1]
    shape[axis], strides[axis] = 3, 2**30
    q, k, v = (sparse_strided(shape, strides, torch.float32).copy_(torch.randn(shape)) for _ in range(3))
    want = run(OPS["attention"].reference, {"q": q.clone(), "k": k.clone(), "v": v.clone()}, ("q", "k", "v"))
    with backend.using("triton"), sanitized():
        got = run(attention, {"q": q, "k": k, "v": v}, ("q", "k", "v"))
    for name, value in want.items():
        assert_close(name, got[name], value, atol=1e-5)


def test_tokens_far_apart_are_copied():
    q, k, v = (sparse_strided((1, 3, 1, 16), (48, 2**30, 16, 1), torch.float32).normal_() for _ in range(3))
    want = OPS["attention"].reference(q.clone(), k.clone(), v.clone())
    with backend.using("triton"), sanitized():
        assert_close("out", attention(q, k, v), want, atol=1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_matches_gpt_oss_of_transformers_forward_and_backward(window):
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    T = 90
    leaves = [torch.randn(2, T, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    leaves.append(torch.randn(4, requires_grad=True))
    q, k, v, sinks = leaves
    i = torch.arange(T)
    hidden = (i[:, None] < i) | ((i[:, None] - i >= window) if window else False)
    mask = torch.zeros(1, 1, T, T).masked_fill(hidden, torch.finfo(torch.float32).min)
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    want, _ = modeling.eager_attention_forward(module, *(x.transpose(1, 2) for x in (q, k, v)), mask, 16**-0.5)
    d_out = torch.randn_like(want)
    with backend.using("triton"):
        got = attention(q, k, v, window=window, sinks=sinks)
        gradients = torch.autograd.grad(got, leaves, d_out)
    assert_close("out", got, want, atol=1e-5)
    wanted = torch.autograd.grad(want, leaves, d_out)
    for name, gradient, other in zip(("dq", "dk", "dv", "d_sinks"), gradients, wanted, strict=True):
        assert_close(name, gradient, other, atol=1e-5 * float(other.abs().max()))
