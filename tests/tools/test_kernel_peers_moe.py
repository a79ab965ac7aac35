"""The peers of the mixture of experts compute what we compute: otherwise their times would mean nothing."""

from __future__ import annotations

import pytest
import torch

from grist_kernels import OPS
from grist_kernels.cases import expected, run
from grist_tools.bench_kernels_case import error_ratio
from grist_tools.kernel_peers import peers
from grist_tools.kernel_targets import targets
from grist_tools.kernel_work import work

CASES = [
    pytest.param(OPS[op], case, id=f"{op}-{case.name}")
    for op in ("grouped_matmul", "moe", "moe_mxfp4")
    for case in OPS[op].cases
    if not case.large and case.name != "several_blocks"
]


def peers_of(op, arguments, **options):
    return {name: peer for name, peer in peers(op, arguments, **options).items() if not peer.absent}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_peers_agree(op, case, dtype):
    arguments = case.arguments(dtype)
    wanted = expected(op.reference, case, arguments)
    found = peers_of(op, arguments, all_of_them=False)
    assert "eager" in found
    for name, peer in found.items():
        assert error_ratio(run(peer.function, peer.prepare(arguments), case.gradients), wanted) <= 1, name


def test_which_peers_a_call_has():
    by_name = {case.name: case for case in OPS["moe"].cases}
    everyone = {"eager", "loop", "F.grouped_mm"}
    arguments = by_name["gpt_oss"].arguments(torch.bfloat16)
    assert set(peers_of(OPS["moe"], arguments, all_of_them=True)) == everyone | {"F.grouped_mm compiled"}
    # torch.compile's own limits, and those of F.grouped_mm: rows of 16 bytes.
    assert set(peers_of(OPS["moe"], by_name["gpt_oss"].arguments(torch.float32), all_of_them=True)) == everyone
    odd = by_name["odd"].arguments(torch.bfloat16)
    assert set(peers_of(OPS["moe"], odd, all_of_them=True)) == {"eager", "loop"}
    spare = next(case for case in OPS["grouped_matmul"].cases if case.name == "rows_of_nobody")
    assert set(peers_of(OPS["grouped_matmul"], spare.arguments(torch.float32), all_of_them=True)) == {"eager"}


def test_weights_of_idle_experts_are_not_read():
    """What a decoded token has to read is its own experts' weights."""
    for name in ("moe", "moe_mxfp4"):
        op = OPS[name]
        arguments = op.cases[0].arguments(torch.bfloat16)
        chosen = arguments["expert_ids"].unique().numel()
        few = work(name, arguments, (), []).forward_bytes
        every = {**arguments, "expert_ids": torch.arange(chosen).view(1, -1)}
        stacked = {
            key: value[: chosen if value.dim() > 1 and value.shape[0] > chosen else None]
            for key, value in every.items()
            if isinstance(value, torch.Tensor)
        }
        assert few == work(name, every | stacked, (), []).forward_bytes


def test_targets_go_by_rows_of_an_expert():
    shares = {}
    for name in ("gpt_oss_20b", "gpt_oss_120b", "one_decoded"):
        T, E = {"gpt_oss_20b": (8192, 32), "gpt_oss_120b": (4096, 128), "one_decoded": (1, 32)}[name]
        arguments = {
            "x": torch.empty(T, 8, device="meta"),
            "expert_ids": torch.empty(T, 4, dtype=torch.int64, device="meta"),
            "w_down": torch.empty(E, 8, 8, device="meta"),
        }
        shares[name] = targets("moe", arguments, torch.bfloat16, "cuda")
    assert shares["gpt_oss_20b"] == {"forward": 0.65, "backward": 0.58}
    assert shares["gpt_oss_120b"]["forward"] == 0.55
    assert shares["one_decoded"] == {}
