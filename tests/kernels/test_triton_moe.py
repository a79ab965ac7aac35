"""The mixture-of-experts kernels beyond the cases of the ops: whatever a router may choose, in the interpreter, watched.

T tokens, D model width, E experts, A active experts per token, F expert width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from assertions import assert_close
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grist_kernels import OPS, backend, launch
from grist_kernels.cases import expected, run
from grist_kernels.grouped_matmul import cases as grouped_cases
from grist_kernels.moe import cases as moe_cases

pytest.importorskip("triton")
if not backend.INTERPRETING:
    pytest.skip("needs TRITON_INTERPRET=1, and triton not yet imported without it", allow_module_level=True)

from interpreter_sanitizer import sanitized

from grist_kernels.expert_rows import CHUNK, route, schedule
from grist_kernels.grouped_matmul.launches import SIZES, tile_rows

GPT_OSS = moe_cases.GPT_OSS


def watched(op: str, arguments: dict[str, Any], gradients: tuple[str, ...] = (), seed: int = 0):
    """Results by the kernels, under the sanitizer, with guarded inputs."""
    with backend.using("triton"), sanitized(seed) as report:
        guarded = {k: report.guarded(v, k) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        return run(OPS[op].door, guarded, gradients), report


def agrees(op: str, case, dtype: torch.dtype, seed: int = 0, allowing: dict[str, float] | None = None) -> None:
    """allowing: factors of what is allowed, by the name of a result."""
    got, report = watched(op, case.arguments(dtype), case.gradients, seed)
    for name, value in expected(OPS[op].reference, case, case.arguments(dtype)).items():
        allowed = value.allowed * (allowing or {}).get(name, 1.0)
        assert_close(f"{op} {case.name} {name}", got[name], value.want, allowed=allowed)
    for launched in report.runs:
        assert not any(launched.unwritten.values()), f"{launched.kernel} left elements unwritten: {launched.unwritten}"


# Routing.


@st.composite
def routings(draw) -> torch.Tensor:
    """(T, A) expert ids, as unfair as may be: few favourites, everyone alike, or one after another."""
    E, A = draw(st.sampled_from([1, 2, 3, 8, 33])), draw(st.sampled_from([1, 2, 4, 16]))
    T = draw(st.sampled_from([1, 2, 7, 40]))
    favourites = draw(st.lists(st.integers(0, E - 1), min_size=1, max_size=4))
    kind = draw(st.sampled_from(["favourites", "random", "in turn"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    if kind == "favourites":
        return torch.tensor(favourites)[torch.randint(len(favourites), (T, A), generator=generator)]
    if kind == "random":
        return torch.randint(E, (T, A), generator=generator)
    return (torch.arange(T * A) % E).view(T, A)


def experts_of(ids: torch.Tensor) -> int:
    return int(ids.max()) + 2  # the last one is always idle


@settings(max_examples=20, deadline=None)
@given(ids=routings(), bfloat16=st.booleans(), gpt_oss=st.booleans(), bias=st.booleans(), seed=st.integers(0, 9))
@example(ids=torch.full((40, 1), 3), bfloat16=True, gpt_oss=True, bias=True, seed=0)
@example(ids=torch.tensor([[511]]), bfloat16=False, gpt_oss=False, bias=True, seed=0)
def test_any_routing(ids, bfloat16, gpt_oss, bias, seed):
    T, A = ids.shape
    options = GPT_OSS if gpt_oss else {}
    case = moe_cases._case("drawn", T, 24, experts_of(ids), A, 20, bias=bias, ids=lambda T, A: ids, **options)
    # act . p + d_out . b_down rounds otherwise than autograd's d_out . y, and of a few elements one error says little.
    agrees("moe", case, torch.bfloat16 if bfloat16 else torch.float32, seed, {"d_expert_weights": 2.0})


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 5, 17, 63, 130]), min_size=1, max_size=9),
    spare=st.sampled_from([0, 1, 70]),
    bfloat16=st.booleans(),
    bias=st.booleans(),
)
@example(counts=[0, 0, 0], spare=70, bfloat16=False, bias=True)
def test_any_row_counts(counts, spare, bfloat16, bias):
    case = grouped_cases._case("drawn", counts, 40, 72, bias, spare)
    agrees("grouped_matmul", case, torch.bfloat16 if bfloat16 else torch.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
def test_every_tile_of_every_architecture(size, architecture):
    """Block sizes differ by target; all of them give the reference's results, at widths that none of them divides."""
    rows = {16: 8, 32: 30, 64: 50, 128: 200}[size]
    case = moe_cases._case("tile", rows, 72, 2, 2, 72, ids=lambda T, A: (torch.arange(T * A) % 2).view(T, A), **GPT_OSS)
    assert tile_rows(2 * rows, 2) == size
    with launch.assuming(launch.Target(architecture, 4)):
        agrees("moe", case, torch.bfloat16)
        if size <= 32:
            agrees("moe", replace(case, name="float32"), torch.float32)


@pytest.mark.parametrize("pairs", [1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3])
@pytest.mark.parametrize("experts", [1, 3, 17, 512])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_route_is_a_stable_sort(pairs, experts, dtype):
    ids = torch.randint(experts, (pairs, 1), dtype=dtype)
    with sanitized(seed=3) as report:
        place, pair, ends = route(report.guarded(ids, "ids"), experts)
    order = ids.flatten().argsort(stable=True)
    assert pair.tolist() == order.tolist()
    assert place[order].tolist() == list(range(pairs))
    assert ends.tolist() == torch.bincount(ids.flatten(), minlength=experts).cumsum(0).tolist()


@pytest.mark.parametrize(("tokens", "experts"), [(2**31, 1), (2**30 + 1, 512)])
def test_more_pairs_than_32_bits_number_are_refused(tokens, experts):
    with pytest.raises(ValueError, match="use micro-batches of fewer tokens"):
        route(torch.empty(tokens, 1, dtype=torch.int64, device="meta"), experts)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=600),
    block=st.sampled_from(SIZES),
    spare=st.one_of(st.none(), st.integers(0, 40)),
)
def test_schedule_covers_every_row_once(counts, block, spare):
    rows = sum(counts) + (spare or 0)
    ends = torch.tensor(counts).cumsum(0)
    starts, tile_expert, tile_row = schedule(ends, rows, block, spare is not None)
    owners = counts if spare is None else [*counts, spare]
    want = [e for e, count in enumerate(owners) for _ in range(count)]
    bounds, got = starts.tolist(), [-1] * rows
    assert bounds == [0, *torch.tensor(owners).cumsum(0).tolist()]
    for expert, first in zip(tile_expert.tolist(), tile_row.tolist(), strict=True):
        if expert < 0:
            continue
        for row in range(first, min(first + block, bounds[expert + 1])):
            assert got[row] == -1, f"row {row} is in two tiles"
            got[row] = expert
    assert got == want


def test_offsets_out_of_range_stay_inside_the_tensors():
    """On a GPU nobody can ask without waiting: whatever offsets say, only rows that exist are touched."""
    x = torch.randn(9, 16)
    for offsets in ([-5, 4, 4, 100], [10, 12, 12, 12], [-3, -2, -1, 0], [2**31 - 1] * 20):
        w = torch.randn(len(offsets), 16, 16)
        watched("grouped_matmul", {"x": x, "w": w, "offsets": torch.tensor(offsets)}, ("x", "w"))


@pytest.mark.parametrize("pairs", [2, 600])
def test_ids_that_are_no_expert_s_give_nan(pairs):
    """To that token, and to no other: nothing is read or written out of place, and nothing is silently left out."""
    T, A, E = pairs // 2, 2, 4
    ids = torch.arange(T * A).view(T, A) % E
    ids[0, 1] = -1
    if T > 1:
        ids[7, 0], ids[9] = E, 2**31 - 1
    case = moe_cases._case("bad", T, 16, E, A, 8, ids=lambda T, A: ids)
    arguments = case.arguments(torch.float32)
    got, _ = watched("moe", arguments, ("x", "expert_weights"))
    bad = ((ids < 0) | (ids >= E)).any(1)
    for name, value in got.items():
        assert value.isnan().any(1).tolist() == bad.tolist(), name
    if T > 1:
        kept = ~bad
        fine = {k: v[kept] if k in ("x", "expert_ids", "expert_weights") else v for k, v in arguments.items()}
        want = OPS["moe"].reference(**fine)
        assert_close("the other tokens", got["out"][kept], want, atol=1e-4)


# What is kept, copied and waited for.


def test_nothing_is_asked_of_the_device():
    """Tensors without memory have no values: asking for one, forward or backward, would raise."""
    launched = []
    before = launch.run
    launch.run = lambda kernel, grid, *rest, **constants: launched.append(grid)
    try:
        for op in ("moe", "grouped_matmul"):
            case = next(case for case in OPS[op].cases if case.name in ("gpt_oss", "odd") and case.name != "one")
            arguments = case.arguments(torch.float32, "meta")
            with backend.using("triton"):
                run(OPS[op].door, arguments, case.gradients)
    finally:
        launch.run = before
    assert len(launched) > 15


def moe_arguments(**options) -> dict[str, Any]:
    case = next(case for case in OPS["moe"].cases if case.name == "gpt_oss")
    return case.arguments(torch.float32) | options


def test_weights_are_read_where_they_lie():
    """GPT-OSS's layout, and ours transposed: no more storages than for contiguous weights."""
    turned = moe_arguments()
    for name in ("w_gate_up", "w_down"):
        turned[name] = turned[name].transpose(1, 2).contiguous().transpose(1, 2)
    usual = moe_arguments()
    with backend.using("triton"):
        with sanitized() as plain:
            want = OPS["moe"].door(**usual)
        with sanitized() as strided:
            got = OPS["moe"].door(**turned)
    assert torch.equal(got, want)
    assert strided.allocations == plain.allocations


def test_kept_for_the_backward():
    """Beside the arguments: the hidden values and integers. Nothing of a token's width for each of its experts."""
    T, D, E, A, F = 32, 64, 4, 2, 16
    case = moe_cases._case("kept", T, D, E, A, F)
    arguments = case.arguments(torch.float32)
    given_storages = {v.untyped_storage().data_ptr() for v in arguments.values() if isinstance(v, torch.Tensor)}
    kept = []
    for name in case.gradients:
        arguments[name].requires_grad_()

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in given_storages:
            kept.append(tensor)
        return tensor

    with backend.using("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        OPS["moe"].door(**arguments)
    floating = sum(t.numel() for t in kept if t.is_floating_point())
    integers = sum(t.numel() for t in kept if not t.is_floating_point())
    assert (floating, integers) == (T * A * 2 * F, 2 * T * A + E)


def test_inference_keeps_nothing():
    arguments = moe_arguments()
    T, A = arguments["expert_ids"].shape
    hidden_bytes = T * A * arguments["w_gate_up"].shape[2] * 4
    with backend.using("triton"):
        module = backend.triton_kernel("moe")
        options = (arguments["alpha"], arguments["limit"], True)
        tensors = [arguments[k] for k in ("x", "expert_ids", "expert_weights", "w_gate_up", "w_down")]
        biases = [arguments["b_gate_up"], arguments["b_down"]]
        kept, forgotten = (module._forward(*tensors, *biases, *options, keep) for keep in (True, False))
    assert torch.equal(kept[0], forgotten[0])
    assert kept[1].numel() * 4 == hidden_bytes
    assert forgotten[1].numel() == 0


def test_same_bits_every_time():
    arguments, case = moe_arguments(), next(case for case in OPS["moe"].cases if case.name == "gpt_oss")
    first, _ = watched("moe", arguments, case.gradients, seed=1)
    for seed in (2, 3):
        again, _ = watched("moe", arguments, case.gradients, seed=seed)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


def test_experts_without_rows_get_exactly_zero():
    arguments = moe_arguments(expert_ids=torch.full((63, 4), 5))
    got, _ = watched("moe", arguments, ("w_gate_up", "w_down", "b_gate_up", "b_down"))
    for name in ("d_w_gate_up", "d_w_down", "d_b_gate_up", "d_b_down"):
        idle = [e for e in range(8) if e != 5]
        assert not got[name][idle].any(), name
        assert got[name][5].any(), name


def test_a_bad_token_spoils_its_own_experts_only():
    """Lanes beyond an expert's rows read nothing: zero times NaN would be NaN."""
    arguments = moe_arguments()
    ids = torch.arange(63 * 4).view(63, 4) % 8
    arguments |= {"expert_ids": ids, "expert_weights": arguments["expert_weights"].clone()}
    arguments["expert_weights"][0] = float("nan")
    got, _ = watched("moe", arguments, ("x", "w_gate_up", "w_down", "b_gate_up", "b_down"))
    spoilt = [e in ids[0].tolist() for e in range(8)]
    for name in ("d_w_gate_up", "d_w_down", "d_b_gate_up", "d_b_down"):
        assert got[name].flatten(1).isnan().any(1).tolist() == spoilt, name
    for name in ("out", "d_x"):
        assert got[name].isnan().any(1).tolist() == [True] + [False] * 62, name
