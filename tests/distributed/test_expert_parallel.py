"""Experts shared by ranks compute what one process computes: gradients, 50 steps, checkpoints from any layout to any other."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expert_layouts import MODELS, RESUMED, ROUTINGS, SAVED_AT, STEPS, Layout, gradients, resumed, start_rank, whole_run
from torch.multiprocessing.spawn import spawn

from grist_train import distributed
from grist_train.config import ComputeConfig

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

RECOMPUTED = ComputeConfig(activation_checkpointing="block")
ALONE = {name: Layout(name, 1, 1) for name in MODELS}
PAIR = Layout("4 experts", 2, 2)
FOUR = Layout("4 experts", 4, 4, RECOMPUTED)
TWO_GROUPS = Layout("4 experts", 4, 2, ComputeConfig(reduce_every_micro_batch=True))
IN_ROWS = Layout("6 experts", 4, 2, RECOMPUTED)
DENSE_LAYOUT = Layout("4 experts", 4, 1)
# What each number of ranks computes from the first step, and which checkpoints it goes on from.
WORK = {
    4: (
        [FOUR, TWO_GROUPS, IN_ROWS],
        [
            (ALONE["4 experts"], FOUR),
            (ALONE["4 experts"], TWO_GROUPS),
            (ALONE["6 experts"], IN_ROWS),
            (FOUR, TWO_GROUPS),
            (TWO_GROUPS, FOUR),
            (FOUR, DENSE_LAYOUT),
        ],
    ),
    2: ([PAIR], [(ALONE["4 experts"], PAIR), (FOUR, PAIR), (TWO_GROUPS, Layout("4 experts", 2, 1))]),
}
BACK_TO_ONE = [PAIR, FOUR, TWO_GROUPS, IN_ROWS]
LAYOUTS = [layout for layouts, _ in WORK.values() for layout in layouts]
PAIRS = [*(pair for _, loads in WORK.values() for pair in loads), *((s, ALONE[s.model]) for s in BACK_TO_ONE)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_ranks(ranks: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    layouts, loads = WORK[ranks]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    spawn(start_rank, args=(ranks, layouts, [(s.name, t) for s, t in loads], folder), nprocs=ranks)
    return [torch.load(folder / f"found-{ranks}-{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """{ranks: [what each rank found]}; four ranks before two, which go on from their checkpoints."""
    folder = tmp_path_factory.mktemp("layouts")
    alone: dict[str, Any] = {"gradients": {}, "runs": {}, "resumed": {}, "weights": {}}
    world = distributed.start("cpu", threads=1)
    try:
        for layout in ALONE.values():
            alone["gradients"][layout.model] = gradients(layout, world)
            alone["runs"][layout.model] = whole_run(layout, world, folder)
        with pytest.MonkeyPatch.context() as patch:
            results = {ranks: on_ranks(ranks, folder, patch) for ranks in WORK}
        for source in BACK_TO_ONE:
            back = ALONE[source.model]
            alone["resumed"][f"{source.name} -> {back.name}"] = resumed(source.name, back, world, folder)
    finally:
        distributed.stop()
    alone["weights"] = {layout.name: torch.load(folder / f"{layout.name}.pt") for layout in [*ALONE.values(), *LAYOUTS]}
    return {1: [alone], **results}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_gradients_equal_those_of_one_process(found, layout):
    """float64, whole batch on one process: every gradient to 1e-6 of its largest value (routers compute in float32)."""
    want = found[1][0]["gradients"][layout.model]
    for result in found[layout.ranks]:
        got = result["gradients"][layout.name]
        assert got.keys() == want.keys()
        for name in want:
            scale = float(want[name].abs().max())
            assert scale > 0, f"{name} has no gradient: the comparison would prove nothing"
            error = float((got[name] - want[name]).abs().max())
            assert error <= 1e-6 * scale, f"{name} is off by {error / scale:.1e} of its largest value"


def assert_same_rows(layout: Layout, got: list[list[float]], want: list[list[float]]) -> None:
    """Loss to 1e-5; gradient norm, router losses and entropies to 1e-3; the load of every expert, to the token."""
    layers = MODELS[layout.model].layers
    for step, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert mine[0] == pytest.approx(theirs[0], rel=1e-5), f"loss of row {step}"
        assert mine[1 : 4 + layers] == pytest.approx(theirs[1 : 4 + layers], rel=1e-3), f"figures of row {step}"
        assert mine[4 + layers :] == theirs[4 + layers :], f"loads of row {step}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_fifty_steps_have_the_losses_of_one_process(found, layout):
    want = found[1][0]["runs"][layout.model]
    assert len(want) == STEPS
    assert want[-1][0] < want[0][0] - 0.5, "the run must learn, or equal losses would prove nothing"
    for result in found[layout.ranks]:
        assert_same_rows(layout, result["runs"][layout.name], want)


@pytest.mark.parametrize(("source", "layout"), PAIRS, ids=lambda layout: layout.name)
def test_checkpoints_go_on_in_any_layout(found, source, layout):
    """Weights, selection biases and the state of both optimizers: without any of them the losses would not be the same."""
    for result in found[layout.ranks]:
        want = found[1][0]["runs"][layout.model][SAVED_AT : SAVED_AT + RESUMED]
        assert_same_rows(layout, result["resumed"][f"{source.name} -> {layout.name}"], want)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_portable_weights_are_whole(found, layout):
    weights = found[1][0]["weights"]
    got, want = weights[layout.name], weights[ALONE[layout.model].name]
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("ranks", WORK)
@pytest.mark.parametrize("case", [*ROUTINGS, "bfloat16"])
def test_any_routing_arrives(found, ranks, case):
    """All tokens to one rank, experts and ranks without any: outputs and gradients of all tokens on one process."""
    for rank, result in enumerate(found[ranks]):
        for name, (error, allowed) in result["experts"][case].items():
            assert error <= allowed, f"rank {rank}, {name}: error {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("ranks", WORK)
def test_the_same_bits_every_time(found, ranks):
    assert all(result["same bits"] for result in found[ranks])


def test_compiled_blocks_break_at_the_experts_and_go_on(found):
    for result in found[PAIR.ranks]:
        rows, graphs = result["compiled"]
        assert_same_rows(PAIR, rows, found[1][0]["runs"][PAIR.model][:2])
        assert graphs > 0, "nothing was compiled"
