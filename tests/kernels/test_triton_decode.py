"""decode_attention's Triton kernels in the interpreter, watched: splits, pages, windows, huge strides, counts, compilers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import assert_close
from torch import Tensor

from grist_kernels import OPS, backend, decode_attention, launch
from grist_kernels.cases import Case, expected
from grist_kernels.decode_attention.cases import paged

pytest.importorskip("triton")
if not backend.INTERPRETING:
    pytest.skip("needs TRITON_INTERPRET=1, and triton not yet imported without it", allow_module_level=True)

import interpreter_shim
from interpreter_memory import sparse_strided
from interpreter_sanitizer import Report, ends, sanitized

from grist_kernels.decode_attention import triton_kernel

interpreter_shim.install()

OP = OPS["decode_attention"]
SMALL = [pytest.param(case, id=case.name) for case in OP.cases if not case.large]
BIG = 2**30  # a stride; two of them leave 32 bits
MANY = launch.Target("sm_90", 1000)  # processors enough for as many splits as there can be


@pytest.fixture(autouse=True)
def _triton():
    with backend.using("triton"):
        yield


@pytest.fixture
def narrow_splits(monkeypatch):
    """Splits of a few blocks, so that small caches have many."""
    monkeypatch.setattr(triton_kernel, "SPLIT_SLOTS", 32)
    with launch.assuming(MANY):
        yield


def case(name: str) -> Case:
    return next(each for each in OP.cases if each.name == name)


def watched(arguments: dict, seed: int = 0) -> tuple[Tensor, Report]:
    """The result of a call under the sanitizer, with guarded inputs."""
    with sanitized(seed) as report:
        guarded: dict[str, Any] = {
            name: report.guarded(value, name) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        return decode_attention(**guarded), report


def inputs(lengths: list[int], T: int = 1, S: int = 200, N: int = 4, K: int = 2, H: int = 32) -> dict:
    B = len(lengths)
    q, k_cache, v_cache = torch.randn(B, T, N, H), torch.randn(B, S, K, H), torch.randn(B, S, K, H)
    return {"q": q, "k_cache": k_cache, "v_cache": v_cache, "lengths": torch.tensor(lengths, dtype=torch.int32)}


def bfloat16(arguments: dict) -> dict:
    return {name: value.bfloat16() if value.is_floating_point() else value for name, value in arguments.items()}


# Against the reference.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL)
def test_kernel_matches_reference(case, dtype):
    arguments = case.arguments(dtype)
    wanted = expected(OP.reference, case, arguments)["out"]
    got, report = watched(arguments)
    assert_close(case.name, got, wanted.want, allowed=wanted.allowed)
    for launched in report.runs:
        assert not any(launched.unwritten.values()), f"{launched.kernel} left elements unwritten: {launched.unwritten}"


@pytest.mark.parametrize("case", SMALL)
def test_many_splits_match_reference(case, narrow_splits):
    arguments = case.arguments(torch.float32)
    wanted = expected(OP.reference, case, arguments)["out"]
    got, _ = watched(arguments)
    assert_close(case.name, got, wanted.want, allowed=wanted.allowed)


@pytest.mark.parametrize("name", ["several_splits_and_tokens", "paged_splits", "paged_window"])
def test_order_of_programs_does_not_matter(name):
    arguments = case(name).arguments(torch.bfloat16)
    first, second = (watched(arguments, seed)[0] for seed in (1, 2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("B", [0, 2])
@pytest.mark.parametrize("T", [0, 1])
@pytest.mark.parametrize("S", [0, 5])
def test_nothing_in_nothing_out(B, T, S):
    arguments = inputs([0] * B, T=T, S=S)
    got, report = watched(arguments)
    assert torch.equal(got, torch.zeros(B, T, 4, 32))
    assert len(report.launches) == (B * T > 0)


# Who sees what.


@pytest.mark.parametrize("window", [None, 1, 33, 1000])
@pytest.mark.parametrize("splits", ["one", "many"])
def test_queries_see_the_window_and_nothing_else(window, splits, request):
    """With values that are unit vectors, one a slot, the output is the probabilities themselves."""
    if splits == "many":
        request.getfixturevalue("narrow_splits")
    S, T, lengths = 128, 3, [128, 70, 2]
    arguments = inputs(lengths, T=T, S=S, K=1, H=S) | {"v_cache": torch.eye(S).expand(3, S, S)[:, :, None]}
    got, report = watched(arguments | {"window": window})
    assert len(report.launches) == (2 if splits == "many" and (window or S) > 32 else 1)
    for b, length in enumerate(lengths):
        for t in range(T):
            position = length - T + t
            first = 0 if window is None else max(0, position - window + 1)
            for n in range(4):
                seen = got[b, t, n].nonzero().flatten().tolist()
                assert seen == list(range(first, position + 1)), f"sequence {b}, token {t}, head {n}"
    some = (torch.tensor(lengths)[:, None] - T + torch.arange(T) >= 0).float()
    assert_close("sums", got.sum(-1), some[:, :, None].expand(3, T, 4), atol=1e-6)
    sinks = watched(arguments | {"window": window, "sinks": torch.zeros(4)})[0].sum(-1)
    assert (sinks < 1).all()
    assert (sinks[some > 0] > 0).all()


@pytest.mark.parametrize("splits", ["one", "many"])
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_padding_before_a_short_prompt_gets_zero(sinks, splits, request):
    if splits == "many":
        request.getfixturevalue("narrow_splits")
    arguments = inputs([9, 100], T=12) | ({"sinks": torch.randn(4)} if sinks else {})
    got, _ = watched(arguments)
    assert torch.equal(got[0, :3], torch.zeros(3, 4, 32))
    assert (got[0, 3:] != 0).all()


@pytest.mark.parametrize("name", ["several_splits", "several_tokens", "paged", "paged_splits"])
def test_unused_slots_and_pages_may_hold_anything(name):
    """The cases have NaN there, and -1 in the block table; other values give the same bits."""
    arguments = case(name).arguments(torch.bfloat16)
    other = {key: value.nan_to_num(1e4) if key in ("k_cache", "v_cache") else value for key, value in arguments.items()}
    if "block_table" in arguments:
        other["block_table"] = arguments["block_table"].masked_fill(arguments["block_table"] < 0, 2**30)
    assert not arguments["k_cache"].isfinite().all()
    assert torch.equal(watched(arguments)[0], watched(other)[0])


def test_slots_before_the_window_are_not_read():
    """Neither those before the first token's window, nor, where many tokens make several programs, before their own."""
    arguments: dict[str, Any] = inputs([100], T=40) | {"window": 4}
    want, report = watched(arguments)
    assert report.runs[0].grid == (2 * 5, 1, 1)  # two key heads, blocks of eight tokens
    for slots, same in ((57, slice(None)), (58, slice(8, None))):
        for name in ("k_cache", "v_cache"):
            arguments[name][:, :slots] = torch.nan
        assert torch.equal(watched(arguments)[0][:, same], want[:, same])


def test_a_sink_of_minus_infinity_is_none():
    arguments = inputs([100, 0])
    plain, _ = watched(arguments)
    assert torch.equal(watched(arguments | {"sinks": torch.full((4,), float("-inf"))})[0], plain)


def test_small_arguments_may_have_gaps():
    arguments = case("paged").arguments(torch.float32)
    want, _ = watched(arguments)
    for name in ("lengths", "sinks", "block_table"):
        arguments[name] = arguments[name].repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(watched(arguments)[0], want)


# Pages and splits.


@pytest.mark.parametrize("splits", ["one", "many"])
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
def test_where_pages_lie_changes_no_bit(page_size, splits, request):
    if splits == "many":
        request.getfixturevalue("narrow_splits")
    arguments = bfloat16(inputs([320, 41], T=2, S=320, K=1)) | {"window": 300}
    want, _ = watched(arguments)
    for seed in (0, 1):
        cut = paged(arguments, page_size, torch.Generator().manual_seed(seed))
        assert torch.equal(watched(cut)[0], want), f"pages in order {seed}"


@pytest.mark.parametrize("splits", [2, 3, 7, 13])
def test_splits_agree(splits, monkeypatch):
    """One program over all slots, or as many as blocks and more."""
    arguments = inputs([200, 150, 1, 0], T=2) | {"sinks": torch.randn(4)}
    want, report = watched(arguments)
    assert report.launches == ["_attend_kernel"]
    monkeypatch.setattr(triton_kernel, "split_count", lambda *_: splits)
    got, report = watched(arguments)
    assert [launched.grid for launched in report.runs] == [(8, splits, 1), (32, 1, 1)]
    assert_close("out", got, want, atol=1e-6)


def test_how_many_splits():
    """Shapes decide: as many programs as the processors run at once, none with less to do than a second launch costs."""
    count = triton_kernel.split_count
    assert count(8, 131072, 264) == 33
    assert count(8, 4096, 264) == 16
    assert count(8, 128, 264) == 1
    assert count(200, 131072, 264) == 1
    assert count(1000, 131072, 264) == 1
    assert count(0, 0, 264) == 1


def test_lengths_do_not_decide_the_launch():
    grids = [[launched.grid for launched in watched(inputs([length], S=1000))[1].runs] for length in (0, 7, 1000)]
    assert grids[0] == grids[1] == grids[2]
    assert len(grids[0]) == 2


# What the cache does not have; only the kernel can notice where nobody may wait for the device.


@pytest.mark.parametrize("splits", ["one", "many"])
def test_lengths_beyond_the_cache_give_nan(splits, request):
    if splits == "many":
        request.getfixturevalue("narrow_splits")
    arguments = inputs([0] * 4) | {"lengths": torch.tensor([200, 201, -1, 2**32 + 5])}
    options: dict[str, Any] = {"window": None, "sinks": None, "scale": None, "block_table": None}
    with sanitized():
        out = triton_kernel.decode_attention(**arguments, **options)
    assert out[0].isfinite().all()
    assert out[1:].isnan().all()


@pytest.mark.parametrize("splits", ["one", "many"])
@pytest.mark.parametrize("page", [-1, 20, 2**31 - 1])
def test_pages_that_are_not_there_give_nan(page, splits, request):
    if splits == "many":
        request.getfixturevalue("narrow_splits")
    arguments = inputs([200, 150], S=160, H=16)
    cache = torch.randn(20, 16, 2, 16)
    table = torch.arange(20, dtype=torch.int32).view(2, 10)
    table[1, 3] = page
    arguments |= {"k_cache": cache, "v_cache": cache, "lengths": torch.tensor([160, 150]), "block_table": table}
    with sanitized():
        out = triton_kernel.decode_attention(**arguments, window=None, sinks=torch.zeros(4), scale=None)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_what_the_kernel_cannot_take_is_an_error():
    arguments = inputs([5])
    with pytest.raises(RuntimeError, match=r"has no gradients, and one was asked for: call it under torch.no_grad"):
        decode_attention(**arguments | {"q": arguments["q"].requires_grad_()})
    with torch.no_grad():
        decode_attention(**arguments)
    with pytest.raises(RuntimeError, match="takes head widths up to 256, but got 264"):
        decode_attention(**inputs([5], S=8, H=264))
    with pytest.raises(RuntimeError, match="takes float32, bfloat16 and float16, but got torch"):
        decode_attention(**arguments | {name: arguments[name].double() for name in ("q", "k_cache", "v_cache")})


# Offsets beyond 2**31 elements, in virtual memory.


def strided(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    return sparse_strided(shape, strides, torch.float32).copy_(torch.randn(shape))


def compare(arguments: dict) -> None:
    """A call on strided arguments against the reference on compact copies."""
    compact = {
        name: value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    want = OP.reference(**compact)
    with sanitized():
        got = decode_attention(**arguments)
    assert_close("out", got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "axis"),  # queries are copied if their columns are not neighbours
    [(name, axis) for name in ("q", "k_cache", "v_cache") for axis in range(4) if (name, axis) != ("q", 3)],
)
def test_axes_far_apart(name, axis):
    arguments = inputs([3, 2, 3], T=3, S=3, N=6, K=3, H=16)
    strides = [512, 128, 16, 1]
    strides[axis] = BIG
    compare(arguments | {name: strided(tuple(arguments[name].shape), tuple(strides))})


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pages_far_apart(axis):
    strides = [512, 128, 16, 1]
    strides[axis] = BIG
    k_cache, v_cache = (strided((5, 4, 3, 16), tuple(strides)) for _ in range(2))
    table = sparse_strided((3, 2), (BIG, 1), torch.int32).copy_(torch.tensor([[4, 3], [0, 4], [2, 1]]))
    lengths = torch.tensor([8, 5, 3])
    compare(
        {
            "q": torch.randn(3, 1, 6, 16),
            "k_cache": k_cache,
            "v_cache": v_cache,
            "lengths": lengths,
            "block_table": table,
        }
    )


def test_many_tokens():
    """Queries and outputs of more than 2**31 elements."""
    T, N, H = 2**19 + 3, 32, 128
    q = sparse_strided((1, T, N, H), (0, N * H, H, 1), torch.float32)
    q[:, -3:] = torch.randn(3, N, H)
    cache = torch.randn(1, 1, 1, H).expand(1, T, N, H)
    with sanitized(programs=ends(2)):
        got = decode_attention(q, cache, cache, torch.tensor([T]), window=4)
    want = OP.reference(q[:, -1:], cache[:, :4], cache[:, :4], torch.tensor([4]))
    assert_close("out", got[:, -1, -2:], want[:, 0, -2:], atol=1e-5)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # rows whose programs do not run are merged from poison
def test_many_parts():
    """Parts of the splits of more than 2**31 elements."""
    T, N, H, S = 2**13 + 2, 64, 64, 64 * 256
    q = sparse_strided((1, T, N, H), (0, N * H, H, 1), torch.float32)
    q[:, -1:] = torch.randn(1, N, H)
    k_cache, v_cache = torch.randn(1, S, 1, H), torch.randn(1, S, 1, H)
    blocks = T * N // 16  # of rows

    def last_block(programs: int) -> range:
        return range(blocks - 1, programs, blocks)

    with launch.assuming(launch.Target("sm_90", 64 * blocks)), sanitized(programs=last_block) as report:
        got = decode_attention(q, k_cache, v_cache, torch.tensor([S]))
    assert report.runs[0].grid == (blocks, 64, 1)
    want = OP.reference(q[:, -1:], k_cache, v_cache, torch.tensor([S]))
    assert_close("out", got[:, -1, -1], want[:, -1, -1], atol=1e-5)


# Launches, allocations, compilers.


@pytest.mark.parametrize(
    ("name", "launches", "allocations"),
    [("one_token", 1, 1), ("strided", 1, 2), ("paged", 1, 1), ("several_splits", 2, 3), ("paged_splits", 2, 3)],
)
def test_launches_and_allocations(name, launches, allocations):
    """Of the kernel's function: on a CPU the door looks at lengths and pages too. What is strided is q, and copied."""
    options: dict[str, Any] = {"window": None, "sinks": None, "scale": None, "block_table": None}
    arguments = options | case(name).arguments(torch.float32)
    with sanitized() as report:
        triton_kernel.decode_attention(**arguments)
    assert (len(report.launches), report.allocations) == (launches, allocations)


@pytest.mark.parametrize("name", ["window", "several_splits", "paged", "paged_splits", "strided"])
def test_compiled_gives_the_same_bits(name):
    arguments = case(name).arguments(torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(decode_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments), decode_attention(**arguments))


def test_a_compiler_sees_one_op():
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(decode_attention, fullgraph=True, backend=keep)(**case("several_splits").arguments(torch.float32))
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert called == ["gristmill.decode_attention.default"]


@pytest.mark.parametrize("name", ["one_token", "several_splits", "paged", "strided"])
def test_library_op_keeps_torch_s_rules(name):
    given = {"block_table": None, "sinks": None, "window": None} | case(name).arguments(torch.float32)
    order = ("q", "k_cache", "v_cache", "lengths", "block_table", "sinks", "window")
    arguments = (*(given[key] for key in order), 0.125)
    results = torch.library.opcheck(torch.ops.gristmill.decode_attention.default, arguments, raise_exception=False)
    assert set(results.values()) == {"SUCCESS"}, results
