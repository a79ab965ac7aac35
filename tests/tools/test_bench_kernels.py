"""The benchmark of ops: what is wrong is found and not timed, work is counted right, results are written down."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grist_kernels import OPS
from grist_tools import bench_kernels, kernel_work
from grist_tools.bench_kernels import bench_case, check, chosen_cases, chosen_ops, default_out, main, parser, row_text
from grist_tools.kernel_peers import peers
from grist_tools.kernel_work import visible_pairs, work
from grist_tools.timing import Ceilings, measure

LIMITS = Ceilings(1e10, 1e11)
ROOT = Path(__file__).parents[2]


def case(op: str, name: str):
    return next(each for each in OPS[op].cases if each.name == name)


def quick(**changes):
    options = parser().parse_args(["--budget-ms", "1"])
    return type(options)(**{**vars(options), **changes})


def test_a_right_op_is_timed_with_rates_and_peers():
    row = bench_case(OPS["grouped_matmul"], case("grouped_matmul", "aligned"), torch.float32, "cpu", LIMITS, quick())
    assert row["ok"]
    assert row["error_over_allowed"] <= 1
    assert set(row["peers"]) == {"eager", "F.grouped_mm"}
    forward, both = row["forward"], row["forward_backward"]
    assert forward["flops"] == 2 * 256 * 64 * 64
    assert both["flops"] == 3 * forward["flops"]
    # x (256, 64), w (3, 64, 64) and offsets in, (256, 64) out, in float32
    assert forward["bytes"] == 4 * (256 * 64 + 3 * 64 * 64 + 3 + 256 * 64)
    seconds = forward["median_ms"] / 1e3
    assert forward["gigabytes_per_second"] == pytest.approx(forward["bytes"] / seconds / 1e9, abs=1e-3)
    assert forward["p20_ms"] <= forward["median_ms"] <= forward["p80_ms"]
    for peer in row["peers"].values():
        assert peer["error_over_allowed"] <= 1
        assert peer["forward"]["median_ms"] > 0


def test_a_wrong_op_is_found_not_timed_and_fails_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("grist_tools.timing.COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr("grist_tools.timing.MATMUL_ROWS", {"cpu": 64})
    op = OPS["swiglu"]
    slightly_off = replace(op, door=lambda **arguments: op.door(**arguments) * 1.0001)
    row = bench_case(slightly_off, case("swiglu", "plain"), torch.float32, "cpu", LIMITS, quick())
    assert not row["ok"]
    assert row["error_over_allowed"] > 1
    assert "forward" not in row
    assert "WRONG" in row_text(row)
    monkeypatch.setattr(bench_kernels, "chosen_ops", lambda names: [slightly_off])
    out = tmp_path / "out.json"
    assert main(["--cases", "plain", "--device", "cpu", "--budget-ms", "1", "--out", str(out)]) == 1
    assert "WRONG" in capsys.readouterr().out
    assert not json.loads(out.read_text())["rows"][0]["ok"]


@pytest.mark.parametrize(
    "broken",
    [
        lambda out: out * float("nan"),
        lambda out: out[..., :-1],
    ],
)
def test_a_result_without_numbers_or_of_another_shape_is_infinitely_wrong(broken):
    op, each = OPS["rms_norm"], replace(case("rms_norm", "odd"), gradients=())
    arguments = each.arguments(torch.float32)
    assert check(lambda **given: broken(op.door(**given)), op, each, arguments) == float("inf")
    assert check(op.door, op, each, arguments) <= 1


def test_wrong_gradients_alone_are_found():
    op, each = OPS["swiglu"], case("swiglu", "plain")
    arguments = each.arguments(torch.float32)

    def half_gradient(gate_up):
        out = op.door(gate_up)
        return out.detach() + 0.5 * (out - out.detach())

    assert check(half_gradient, op, each, arguments) > 1


def test_a_peer_that_fails_is_written_down():
    def no_bfloat16(**arguments):
        raise RuntimeError("not implemented for this type\nmore")

    op, each = OPS["rms_norm"], case("rms_norm", "odd")
    row = bench_kernels._peer(no_bfloat16, op, each, each.arguments(torch.float32), "cpu", quick())
    assert row == {"failed": "RuntimeError: not implemented for this type"}


def test_peers_that_do_the_same_are_offered_and_others_are_not():
    def names(op: str, name: str, compiled: bool = False) -> set[str]:
        return set(peers(OPS[op], case(op, name).arguments(torch.float32), compiled=compiled))

    assert names("attention", "odd") == {"eager", "SDPA"}
    assert names("attention", "sinks") == names("attention", "window") == names("attention", "packed") == {"eager"}
    assert names("attention", "with_lse") == {"eager"}
    assert names("grouped_matmul", "odd") == {"eager"}
    assert names("rms_norm", "residual", compiled=True) == {"eager", "compile", "F.rms_norm"}
    assert "F.cross_entropy" in names("linear_cross_entropy", "label_smoothing")
    assert names("linear_cross_entropy", "softcap") == names("linear_cross_entropy", "none") == {"eager"}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_peers_take_the_arguments_of_every_case_and_compute_the_same(op):
    for each in op.cases:
        if each.large or each.name == "all_ignored":  # of nothing, PyTorch's mean is NaN and ours is 0
            continue
        arguments = each.arguments(torch.float32)
        for name, peer in peers(op, arguments, compiled=False).items():
            assert check(peer, op, each, arguments) <= 4, f"{name} on {each.name}"


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


def test_decoding_moves_only_the_visible_part_of_the_cache():
    arguments = case("decode_attention", "window").arguments(torch.float32)
    out = torch.empty_like(arguments["q"])
    found = work("decode_attention", arguments, (), [out])
    slots = sum(min(length, arguments["window"]) for length in arguments["lengths"].tolist())
    assert found.forward_bytes == 4 * (2 * out.numel() + 2 * slots * arguments["k_cache"][0, 0].numel())
    assert found.both_bytes == found.forward_bytes


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


def test_a_median_needs_several_calls():
    calls = []
    timing = measure(lambda: calls.append(1), "cpu", budget_ms=0.0)
    assert timing.repetitions == 5
    assert len(calls) == 5 + 3  # the warm-up is not among them


def test_cases_are_chosen_by_size_or_name():
    ops = chosen_ops("rms_norm,rope")
    assert {case.large for _, case in chosen_cases(ops, "large")} == {True}
    assert {case.large for _, case in chosen_cases(ops, "small")} == {False}
    assert [(op.name, case.name) for op, case in chosen_cases(ops, "odd")] == [("rms_norm", "odd"), ("rope", "odd")]
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


def test_command_line_checks_times_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("grist_tools.timing.COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr("grist_tools.timing.MATMUL_ROWS", {"cpu": 64})
    out = tmp_path / "kernels.json"
    arguments = [
        "--ops",
        "rope,swiglu",
        "--cases",
        "odd,plain",
        "--device",
        "cpu",
        "--budget-ms",
        "1",
        "--out",
        str(out),
    ]
    assert main([*arguments, "--dtypes", "float32,bf16"]) == 0
    report = json.loads(out.read_text())
    assert [(row["op"], row["dtype"]) for row in report["rows"]] == [
        ("rope", "float32"),
        ("swiglu", "float32"),
        ("rope", "bfloat16"),
        ("swiglu", "bfloat16"),
    ]
    assert set(report["ceilings"]) == {"float32", "bfloat16"}
    assert {"what", "command", "commit", "device", "versions", "date", "threads"} <= report.keys()
    assert "rope odd" in capsys.readouterr().out


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
