"""The benchmark of ops: what is wrong is found and not timed, work is counted right, results are written down."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from assertions import assert_close

from grist_kernels import OPS, launch
from grist_kernels.attention.reference import attention_in_blocks, causal_mask
from grist_kernels.cases import expected, run
from grist_tools import bench_kernels, bench_kernels_case, kernel_peers_liger, kernel_work
from grist_tools.bench_kernels import chosen_cases, chosen_ops, default_out, main
from grist_tools.bench_kernels_case import bench_case, error_ratio, inputs, oracle
from grist_tools.bench_kernels_text import row_text
from grist_tools.bench_kernels_times import add_rates, calls, launches, times
from grist_tools.kernel_peers import Peer, peers
from grist_tools.kernel_targets import targets
from grist_tools.kernel_work import visible_pairs, work
from grist_tools.timing import Call, Ceilings

LIMITS = Ceilings(1e10, 1e11)
ROOT = Path(__file__).parents[2]


def case(op: str, name: str):
    return next(each for each in OPS[op].cases if each.name == name)


def quick(op, each, which_peers: str = "none"):
    return bench_case(op, each, torch.float32, "cpu", which_peers=which_peers, budget_ms=1.0)


def check(function, op, each, arguments) -> float:
    return error_ratio(run(function, arguments, each.gradients), expected(op.reference, each, arguments))


@pytest.fixture
def small_ceilings(monkeypatch):
    monkeypatch.setattr("grist_tools.timing.COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr("grist_tools.timing.MATMUL_ROWS", {"cpu": 64})


def test_a_right_op_is_timed_with_rates_and_peers():
    row = quick(OPS["grouped_matmul"], case("grouped_matmul", "aligned"), "some")
    add_rates(row, LIMITS)
    assert row["ok"]
    assert row["error_over_allowed"] <= 1
    assert row["shapes"]["x"] == [256, 64]
    assert set(row["peers"]) == {"eager", "F.grouped_mm"}
    forward, backward, both = row["forward"], row["backward"], row["forward_backward"]
    assert forward["flops"] == 2 * 256 * 64 * 64
    assert backward["flops"] == 2 * forward["flops"]
    assert both["flops"] == 3 * forward["flops"]
    # x (256, 64), w (3, 64, 64) and offsets in, (256, 64) out, in float32
    assert forward["bytes"] == 4 * (256 * 64 + 3 * 64 * 64 + 3 + 256 * 64)
    seconds = forward["median_ms"] / 1e3
    assert forward["gigabytes_per_second"] == pytest.approx(forward["bytes"] / seconds / 1e9, abs=1e-3)
    assert forward["p20_ms"] <= forward["median_ms"] <= forward["p80_ms"]
    for peer in row["peers"].values():
        assert peer["error_over_allowed"] <= 1
        assert all(peer[direction]["median_ms"] > 0 for direction in ("forward", "backward", "forward_backward"))


def test_a_wrong_op_is_found_not_timed_and_fails_the_command(tmp_path, monkeypatch, capsys, small_ceilings):
    op = OPS["swiglu"]
    slightly_off = replace(op, door=lambda **arguments: op.door(**arguments) * 1.0001)
    row = quick(slightly_off, case("swiglu", "plain"))
    assert not row["ok"]
    assert row["error_over_allowed"] > 1
    assert "forward" not in row
    assert "WRONG" in row_text(row)
    monkeypatch.setattr(bench_kernels, "chosen_ops", lambda names: [slightly_off])
    out = tmp_path / "out.json"
    assert main(["--cases", "plain", "--device", "cpu", "--budget-ms", "1", "--out", str(out)]) == 1
    assert "WRONG" in capsys.readouterr().out
    assert not json.loads(out.read_text())["rows"][0]["ok"]
    assert "1 wrong and not timed" in out.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize("broken", [lambda out: out * float("nan"), lambda out: out[..., :-1]])
def test_a_result_without_numbers_or_of_another_shape_is_infinitely_wrong(broken):
    op, each = OPS["rms_norm"], replace(case("rms_norm", "odd"), gradients=())
    row = quick(replace(op, door=lambda **given: broken(op.door(**given))), each)
    assert not row["ok"]
    assert row["failed"] == "a result is not finite, or has another shape"
    json.dumps(row, allow_nan=False)
    assert quick(op, each)["ok"]


@pytest.mark.parametrize("name", ["window_and_sinks", "with_lse", "packed_window_sinks", "packed_lse", "own_scale"])
def test_a_large_case_is_compared_with_the_same_formula_in_blocks(name):
    op, each = OPS["attention"], case("attention", name)
    assert oracle(op, each) is op.reference
    assert oracle(op, replace(each, large=True)) is attention_in_blocks
    assert oracle(OPS["rope"], replace(case("rope", "odd"), large=True)) is OPS["rope"].reference
    arguments = each.arguments(torch.float64)
    want = run(op.reference, arguments, each.gradients)
    for key, value in run(attention_in_blocks, {**arguments, "block": 24}, each.gradients).items():
        assert_close(key, value, want[key], atol=1e-12 * float(want[key].abs().max()))


def test_wrong_gradients_alone_are_found():
    op, each = OPS["swiglu"], case("swiglu", "plain")

    def half_gradient(gate_up):
        out = op.door(gate_up)
        return out.detach() + 0.5 * (out - out.detach())

    assert check(half_gradient, op, each, each.arguments(torch.float32)) > 1


def test_a_peer_that_is_wrong_or_fails_is_written_down_and_not_timed(monkeypatch):
    def no_float32(**arguments):
        raise NotImplementedError("not for this type\nmore")

    op = OPS["rms_norm"]
    wrong = Peer(lambda **given: op.door(**given) * 1.0001, "a note")
    monkeypatch.setattr(
        bench_kernels_case,
        "peers",
        lambda *_, **__: {"wrong": wrong, "failing": Peer(no_float32), "same": Peer(op.door)},
    )
    row = quick(op, case("rms_norm", "odd"), "some")
    assert row["ok"]
    assert "forward" in row
    found = row["peers"]
    assert found["wrong"].keys() == {"note", "error_over_allowed", "ok"}
    assert found["wrong"]["error_over_allowed"] > 1
    assert not found["wrong"]["ok"]
    assert found["failing"] == {"ok": False, "failed": "NotImplementedError: not for this type"}
    assert found["same"]["ok"]
    assert found["same"]["backward"]["median_ms"] > 0


def test_the_backward_is_timed_without_its_forward():
    op, each = OPS["swiglu"], case("swiglu", "plain")
    arguments, forwards = each.arguments(torch.float32), []

    def counted(**given):
        forwards.append(1)
        return op.door(**given)

    found = calls("swiglu", counted, arguments, each.gradients)["backward"]
    assert found.before is not None
    found.before()
    forwards.clear()
    (d_gate_up,) = found.work()
    assert forwards == []
    assert d_gate_up.shape == arguments["gate_up"].shape
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        found.work()  # nothing was kept: every repetition has its own forward


def test_gradients_made_in_the_forward_count_as_backward():
    op, each = OPS["linear_cross_entropy"], case("linear_cross_entropy", "odd")
    contest = {"": calls(op.name, op.door, each.arguments(torch.float32), each.gradients)}
    assert set(contest[""]) == {"forward", "forward_backward"}
    parts = times(contest, "cpu", 1.0)[""]
    assert parts["backward"]["how"] == "forward_backward - forward"
    assert parts["backward"]["median_ms"] == pytest.approx(
        parts["forward_backward"]["median_ms"] - parts["forward"]["median_ms"], abs=1e-5
    )


def test_launches_of_our_kernels_are_counted(monkeypatch):
    ran = []
    monkeypatch.setattr(launch, "run", lambda *arguments, **constants: ran.append(arguments))
    call = Call(
        lambda: [launch.run("kernel", (1,), torch.device("cpu")) for _ in range(3)],
        lambda: launch.run("before", (1,), torch.device("cpu")),
    )
    assert launches(call) == 3
    assert len(ran) == 4  # they did run
    launch.run("afterwards", (1,), torch.device("cpu"))
    assert len(ran) == 5


def test_the_share_of_the_ceiling_without_the_host_stands_beside():
    part = {"median_ms": 2.0, "graph_ms": 1.0, "bytes": 5e6, "flops": 0.0}
    row = {"forward": dict(part), "backward": {"median_ms": 2.0, "bytes": 1e6, "flops": 1e8}}
    add_rates(row, LIMITS)
    assert row["forward"]["fraction_of_ceiling"] == 0.25
    assert row["forward"]["graph_fraction_of_ceiling"] == 0.5
    assert row["forward"]["gigabytes_per_second"] == 2.5
    assert row["backward"]["fraction_of_ceiling"] == 0.5
    assert row["backward"]["teraflops"] == 0.05
    add_rates(row, LIMITS.higher(Ceilings(2e10, 1e9)))
    assert row["forward"]["fraction_of_ceiling"] == 0.125
    assert row["backward"]["fraction_of_ceiling"] == 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_inputs_for_a_gpu_are_made_there(op):
    for each in op.cases:
        if each.large:
            continue
        for name, value in inputs(each, torch.bfloat16, "cuda").items():
            if isinstance(value, torch.Tensor):
                like = each.arguments(torch.bfloat16)[name]
                assert value.is_cuda, f"{each.name} {name}"
                assert (value.shape, value.stride(), value.dtype) == (like.shape, like.stride(), like.dtype)


def test_peers_that_do_the_same_are_offered_and_others_are_not():
    def names(op: str, name: str, all_of_them: bool = False) -> set[str]:
        return set(peers(OPS[op], case(op, name).arguments(torch.float32), all_of_them=all_of_them))

    assert names("grouped_matmul", "rows_of_nobody") == {"eager"}
    assert names("rms_norm", "residual", all_of_them=True) == {"eager", "compile", "F.rms_norm"}
    assert names("swiglu", "plain") == {"eager", "F.silu"}
    assert names("swiglu", "gpt_oss") == names("swiglu", "plain_interleaved") == {"eager"}
    assert "F.cross_entropy" in names("linear_cross_entropy", "label_smoothing")
    assert names("linear_cross_entropy", "softcap") == names("linear_cross_entropy", "none") == {"eager"}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_peers_take_the_arguments_of_every_case_and_compute_the_same(op):
    for each in op.cases:
        if each.large or each.name == "all_ignored":  # of nothing, PyTorch's mean is NaN and ours is 0
            continue
        arguments = each.arguments(torch.float32)
        for name, peer in peers(op, arguments, all_of_them=False).items():
            if peer.absent:
                continue
            got = run(peer.function, peer.prepare(arguments), each.gradients)
            assert error_ratio(got, expected(op.reference, each, arguments)) <= 4, f"{name} on {each.name}"


def test_a_norm_weight_of_another_type_gives_no_wider_result():
    arguments = case("rms_norm", "odd").arguments(torch.bfloat16)
    arguments["weight"] = arguments["weight"].float()
    out = peers(OPS["rms_norm"], arguments, all_of_them=False)["F.rms_norm"].function(**arguments)
    assert out.dtype == torch.bfloat16


class InPlaceRotation(torch.autograd.Function):
    """What LigerRopeFunction does: q, k (B, heads, T, H) over contiguous (B, T, heads, H) memory, overwritten."""

    @staticmethod
    def turned(x, cos, sin):
        assert x.transpose(1, 2).is_contiguous()
        first, second = x.clone().chunk(2, -1)
        half = x.shape[-1] // 2
        cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
        x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))
        return x.transpose(1, 2).transpose(1, 2)

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        assert cos.dim() == 3
        assert cos.shape[-1] == q.shape[-1]
        ctx.save_for_backward(cos, sin)
        return InPlaceRotation.turned(q.data, cos, sin), InPlaceRotation.turned(k.data, cos, sin)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return InPlaceRotation.turned(dq.clone(), cos, -sin), InPlaceRotation.turned(dk.clone(), cos, -sin), None, None


@pytest.mark.parametrize(
    "name", ["odd", "per_sequence", "packed", "packed_with_positions", "positions_per_sequence", "views_of_qkv"]
)
def test_liger_rope_gets_its_layout_and_its_own_copies(name, monkeypatch):
    stand_in = types.ModuleType("liger_kernel.ops.rope")
    stand_in.LigerRopeFunction = InPlaceRotation  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", types.ModuleType("liger_kernel.ops"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rope", stand_in)
    op, each = OPS["rope"], case("rope", name)
    arguments = each.arguments(torch.float32)
    before = arguments["q"].clone()
    peer = kernel_peers_liger._rope(arguments)
    assert peer is not None
    own = peer.prepare(arguments)
    got = run(peer.function, own, each.gradients)
    assert error_ratio(got, expected(op.reference, each, arguments)) <= 1
    assert torch.equal(arguments["q"], before)


def test_visible_pairs_are_those_of_the_mask():
    for queries, keys, window in [(7, 7, None), (7, 7, 3), (1, 9, 4), (3, 9, 20), (5, 2, None)]:
        pairs = sum(
            1
            for query in range(keys - queries, keys)
            for key in range(keys)
            if key <= query and (window is None or query - key < window)
        )
        assert visible_pairs(queries, keys, window) == pairs


def test_attention_work_follows_documents_and_window():
    packed = case("attention", "packed_window_sinks").arguments(torch.float32)
    lengths = packed["cu_seqlens"].diff().tolist()
    pairs = sum(visible_pairs(length, length, packed["window"]) for length in lengths)
    out = torch.empty_like(packed["q"])
    found = work("attention", packed, ("q", "k", "v", "sinks"), [out])
    assert len(lengths) > 1
    assert found.forward_flops == 4 * pairs * out.shape[1] * out.shape[2]
    assert found.both_flops == pytest.approx(3.5 * found.forward_flops)


@pytest.mark.parametrize("name", ["odd", "window", "window_longer_than_time", "packed", "packed_window_sinks"])
def test_attention_flops_are_those_of_the_visible_pairs(name):
    """Four operations a column for each pair, in each batch and query head; the backward's are 2.5 times those."""
    arguments = case("attention", name).arguments(torch.float32)
    q, options = arguments["q"], (arguments.get("window"), arguments.get("cu_seqlens"))
    pairs = int(causal_mask(q.shape[-3], *options, q.device).sum()) * (1 if q.dim() == 3 else q.shape[0])
    found = work("attention", arguments, ("q", "k", "v"), [q])
    assert found.forward_flops == 4 * pairs * q.shape[-2] * q.shape[-1]
    assert found.backward_flops == 2.5 * found.forward_flops


def test_attention_reads_what_it_kept():
    arguments = case("attention", "sinks").arguments(torch.float32)
    q, k, rows = arguments["q"].numel(), arguments["k"].numel(), arguments["q"][..., 0].numel()
    found = work("attention", arguments, ("q", "k", "v", "sinks"), [arguments["q"]])
    assert found.forward_bytes == 4 * (2 * q + 2 * k + 4)
    # q, k, v, out, d_out and lse in; dq, dk and dv out; sinks both ways
    assert found.backward_bytes == 4 * (4 * q + 4 * k + rows + 2 * 4)


def test_decoding_moves_only_the_visible_part_of_the_cache():
    arguments = case("decode_attention", "window").arguments(torch.float32)
    out = torch.empty_like(arguments["q"])
    found = work("decode_attention", arguments, (), [out])
    slots = sum(min(length, arguments["window"]) for length in arguments["lengths"].tolist())
    assert found.forward_bytes == 4 * (2 * out.numel() + 2 * slots * arguments["k_cache"][0, 0].numel())
    assert found.both_bytes == found.forward_bytes


def test_a_norm_reads_and_writes_what_it_must():
    plain, residual = (case("rms_norm", name).arguments(torch.float32) for name in ("odd", "residual"))
    rows, weight = 4 * 2 * 63 * 60, 4 * 60
    found = work("rms_norm", plain, ("x", "weight"), [plain["x"]])
    assert (found.forward_bytes, found.backward_bytes) == (2 * rows + weight, 3 * rows + 2 * weight)
    found = work("rms_norm", residual, ("x", "weight", "residual"), [residual["x"], residual["x"]])
    # dx and dresidual are one tensor
    assert (found.forward_bytes, found.backward_bytes) == (4 * rows + weight, 4 * rows + 2 * weight)
    assert found.both_bytes == found.forward_bytes + found.backward_bytes


def test_elementwise_ops_read_and_write_what_they_must():
    arguments = case("rope", "odd").arguments(torch.float32)
    heads = 4 * (arguments["q"].numel() + arguments["k"].numel())
    tables = 4 * 2 * arguments["cos"].numel()
    found = work("rope", arguments, ("q", "k"), [arguments["q"], arguments["k"]])
    assert found.forward_bytes == found.backward_bytes == 2 * heads + tables
    few = case("rope", "positions_per_sequence").arguments(torch.float32)  # 51 of 1000 rows, int32
    heads = 4 * (few["q"].numel() + few["k"].numel())
    found = work("rope", few, ("q", "k"), [few["q"], few["k"]])
    assert found.forward_bytes == found.backward_bytes == 2 * heads + 2 * 51 * few["cos"].shape[-1] * 4 + 51 * 4
    gate_up = case("swiglu", "plain").arguments(torch.float32)["gate_up"]
    half = 4 * gate_up.numel() // 2
    found = work("swiglu", {"gate_up": gate_up}, ("gate_up",), [gate_up.chunk(2, -1)[0]])
    assert (found.forward_bytes, found.backward_bytes) == (3 * half, 5 * half)


def test_targets_are_for_many_tokens_on_a_gpu():
    def arguments(tokens: int):
        return {"x": torch.empty(2, tokens // 2, 8, device="meta")}

    assert targets("rms_norm", arguments(8192), torch.bfloat16, "cuda") == {"forward": 0.92, "backward": 0.85}
    assert targets("rms_norm", arguments(8190), torch.bfloat16, "cuda") == {}
    assert targets("rms_norm", arguments(8192), torch.float32, "cuda") == {}
    assert targets("rms_norm", arguments(8192), torch.bfloat16, "cpu") == {}
    rope = {"q": torch.empty(2, 4096, 64, 64, device="meta")}
    assert targets("rope", rope, torch.bfloat16, "cuda:1") == {"forward": 0.9, "backward": 0.9}
    loss = {"targets": torch.empty(4096, device="meta")}
    assert targets("linear_cross_entropy", loss, torch.bfloat16, "cuda") == {"forward": 0.8, "backward": 0.85}
    assert targets("grouped_matmul", {}, torch.bfloat16, "cuda") == {}


def test_targets_of_attention_follow_head_width_and_window():
    def of(width: int, tokens: int = 4096, **options):
        arguments = {"q": torch.empty(tokens, 64, width, device="meta"), **options}
        return targets("attention", arguments, torch.bfloat16, "cuda")

    assert of(64) == {"forward": 0.45, "backward": 0.36}
    assert of(128, 32768) == {"forward": 0.60, "backward": 0.42}
    assert of(64, window=128) == of(128, window=100) == {"forward": 0.40, "backward": 0.25}
    assert of(64, window=129) == of(80) == of(64, 4095) == {}
    batch = {"q": torch.empty(2, 2048, 8, 64, device="meta")}
    assert targets("attention", batch, torch.bfloat16, "cuda") == {"forward": 0.45, "backward": 0.36}


def test_moe_and_loss_work():
    moe = case("moe", "odd").arguments(torch.float32)
    assert kernel_work._moe(moe) == 2 * (63 * 2) * (60 * 2 * 20 + 20 * 60)
    loss = case("linear_cross_entropy", "odd").arguments(torch.float32)
    assert kernel_work._linear_cross_entropy(loss) == 2 * 63 * 60 * 257


def test_every_op_has_its_work_counted():
    memory_bound = {"rms_norm", "rope", "swiglu"}
    assert set(kernel_work._FLOPS) | memory_bound == set(OPS)


def test_floor_is_the_slower_of_moving_and_computing():
    assert LIMITS.floor_ms(1e10, 0) == 1e3
    assert LIMITS.floor_ms(1e7, 1e11) == 1e3


def test_cases_are_chosen_by_size_or_name():
    ops = chosen_ops("rms_norm,rope")
    assert {case.large for _, case in chosen_cases(ops, "large")} == {True}
    assert {case.large for _, case in chosen_cases(ops, "small")} == {False}
    assert [(op.name, case.name) for op, case in chosen_cases(ops, "odd")] == [("rms_norm", "odd"), ("rope", "odd")]
    large = [case.large for _, case in chosen_cases(ops, "all")]
    assert large == sorted(large, reverse=True)  # what matters most comes first, if time runs out
    with pytest.raises(ValueError, match="no case is called nothing"):
        chosen_cases(ops, "nothing")
    with pytest.raises(ValueError, match=r"unknown op\(s\) rmsnorm; there are rms_norm"):
        chosen_ops("rmsnorm")


def test_results_are_named_by_device_and_day_and_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_kernels, "__file__", str(tmp_path / "tools" / "grist_tools" / "bench_kernels.py"))
    (tmp_path / "benchmarks").mkdir()
    first = default_out("NVIDIA H200 (SXM)", "2030-01-02")
    assert first == tmp_path / "benchmarks" / "kernels-nvidia-h200-sxm-2030-01-02.json"
    first.touch()
    assert default_out("NVIDIA H200 (SXM)", "2030-01-02").name == "kernels-nvidia-h200-sxm-2030-01-02-2.json"


QUICK = ["--ops", "rope,swiglu", "--cases", "odd,plain", "--device", "cpu", "--budget-ms", "1"]


def test_command_line_checks_times_and_writes(tmp_path, capsys, small_ceilings):
    out = tmp_path / "kernels.json"
    assert main([*QUICK, "--out", str(out), "--dtypes", "float32,bf16"]) == 0
    report = json.loads(out.read_text())
    assert [(row["op"], row["dtype"]) for row in report["rows"]] == [
        ("rope", "float32"),
        ("swiglu", "float32"),
        ("rope", "bfloat16"),
        ("swiglu", "bfloat16"),
    ]
    assert report["complete"]
    assert set(report["ceilings"]) == {"float32", "bfloat16"}
    for found in report["ceilings"].values():
        for key, value in found["used"].items():
            assert value == max(found["before"][key], found["after"][key])
    forward = report["rows"][0]["forward"]
    copy = report["ceilings"]["float32"]["used"]["copy_bytes_per_second"]
    share = forward["bytes"] / copy / (forward["median_ms"] / 1e3)
    assert forward["fraction_of_ceiling"] == pytest.approx(share, abs=1e-4)
    assert {"what", "command", "commit", "device", "versions", "date", "threads", "mode", "how"} <= report.keys()
    assert "rope odd" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.json", "kernels.md", "kernels.svg"]


def test_ctrl_c_keeps_what_is_done(tmp_path, monkeypatch, capsys, small_ceilings):
    def stop_at_the_second(op, each, *arguments, **options):
        if op.name == "swiglu":
            raise KeyboardInterrupt
        return bench_case(op, each, *arguments, **options)

    monkeypatch.setattr(bench_kernels_case, "bench_case", stop_at_the_second)
    out = tmp_path / "kernels.json"
    assert main([*QUICK, "--out", str(out)]) == 130
    report = json.loads(out.read_text())
    assert [row["op"] for row in report["rows"]] == ["rope"]
    assert not report["complete"]
    assert "Incomplete: stopped after 1 of 2 cases" in out.with_suffix(".md").read_text(encoding="utf-8")
    assert "stopped after 1 of 2 cases" in capsys.readouterr().err


def test_a_crash_leaves_what_was_done_on_disk(tmp_path, monkeypatch, small_ceilings):
    def crash_at_the_second(op, each, *arguments, **options):
        if op.name == "swiglu":
            raise RuntimeError("of our own")
        return bench_case(op, each, *arguments, **options)

    monkeypatch.setattr(bench_kernels_case, "bench_case", crash_at_the_second)
    out = tmp_path / "kernels.json"
    with pytest.raises(RuntimeError, match="of our own"):
        main([*QUICK, "--out", str(out)])
    report = json.loads(out.read_text())
    assert [row["op"] for row in report["rows"]] == ["rope"]
    assert not report["complete"]


def test_no_case_begins_after_the_time_limit(tmp_path, small_ceilings):
    out = tmp_path / "kernels.json"
    assert main([*QUICK, "--out", str(out), "--minutes", "0"]) == 0
    report = json.loads(out.read_text())
    assert report["rows"] == []
    assert not report["complete"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.json", "kernels.md"]


@pytest.mark.parametrize("arguments", [["--ops", "x"], ["--dtypes", "int3"], ["--cases", "x"], ["--device", "abacus"]])
def test_bad_input_is_told(tmp_path, capsys, arguments):
    assert main([*arguments, "--out", str(tmp_path / "out.json")]) == 2
    assert capsys.readouterr().err.startswith("bench_kernels: ")
    assert list(tmp_path.iterdir()) == []


def test_runs_where_only_torch_and_numpy_are_installed(tmp_path):
    """A GPU machine may have little else: no import of the benchmark reaches another package."""
    program = """
import sys
from importlib.machinery import PathFinder

BANNED = {"tqdm", "yaml", "jsonargparse", "tokenizers", "transformers", "safetensors", "xxhash", "matplotlib",
          "datasets", "tiktoken", "sacrebleu", "rouge_score", "tensorboard", "liger_kernel"}

class FewPackages(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in BANNED else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = FewPackages
import grist_tools.timing as timing
timing.COPY_BYTES, timing.MATMUL_ROWS = {"cpu": 2**20}, {"cpu": 64}
from grist_tools.bench_kernels import main
sys.exit(main(["--ops", "swiglu", "--cases", "plain", "--device", "cpu", "--budget-ms", "1", "--out", sys.argv[1]]))
"""
    folders = ":".join(str(ROOT / folder) for folder in ("kernels", "model", "data", "eval", "tools"))
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-c", program, str(out)],
        env={"PYTHONPATH": folders, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["rows"][0]["ok"]
