"""Copies, cuts and shares of a model compute what one process computes, and go on from each other's checkpoints."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from layout_matrix import MODEL, SAVED_AT, STEPS, Layout, resumed, start_rank, whole_run
from torch.multiprocessing.spawn import spawn

from grist_train import distributed
from grist_train.config import ComputeConfig, EveryBlocks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

ONE = Layout("one process", 1)
FOUR = [
    Layout("4: cut", 4),
    Layout("4: two copies", 4, ComputeConfig(replicate=2)),
    Layout("4: four copies", 4, ComputeConfig(replicate=4, reduce_every_micro_batch=True)),
    Layout("4: experts of two", 4, ComputeConfig(expert_parallel=2, activation_checkpointing=EveryBlocks(2))),
    Layout("4: experts of four", 4, ComputeConfig(expert_parallel=4, activation_checkpointing="block")),
    Layout("4: two copies, experts of two", 4, ComputeConfig(replicate=2, expert_parallel=2)),
    Layout("4: sequences of two", 4, ComputeConfig(context_parallel=2, activation_checkpointing="selective")),
    Layout("4: sequences of four", 4, ComputeConfig(context_parallel=4, activation_checkpointing="block")),
    Layout("4: sequences and experts of two", 4, ComputeConfig(context_parallel=2, expert_parallel=2)),
    Layout("4: two copies, sequences of two", 4, ComputeConfig(replicate=2, context_parallel=2)),
]
TWO = [
    Layout("2: cut", 2, ComputeConfig(activation_checkpointing="selective")),
    Layout("2: two copies", 2, ComputeConfig(replicate=2, activation_checkpointing="block")),
    Layout("2: experts of two", 2, ComputeConfig(expert_parallel=2)),
    Layout("2: sequences of two", 2, ComputeConfig(context_parallel=2)),
]
LAYOUTS = [*FOUR, *TWO]
# Each goes on from the checkpoint of its neighbour in the list: one process writes for the first, and reads that of the last.
FOUR_LOADS = list(zip([ONE, *FOUR], FOUR, strict=False))
TWO_LOADS = [*zip([FOUR[-1], *TWO], TWO, strict=False), (FOUR[1], TWO[0])]
ONE_LOADS = [(TWO[-1], ONE), (FOUR[-1], ONE)]
LOADS = [*FOUR_LOADS, *TWO_LOADS, *ONE_LOADS]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict[str, list[list[float]]]]]:
    """{ranks: [what each rank found]}; four ranks before two, which go on from their checkpoints."""
    folder = tmp_path_factory.mktemp("layouts")
    world = distributed.start("cpu", threads=1)
    try:
        alone = {ONE.name: whole_run(ONE, world, folder)}
        results = {}
        for ranks, layouts, loads in ((4, FOUR, FOUR_LOADS), (2, TWO, TWO_LOADS)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MASTER_ADDR", "127.0.0.1")
                patch.setenv("MASTER_PORT", str(free_port()))
                patch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
                work = layouts, [(source.name, layout) for source, layout in loads], folder
                spawn(start_rank, args=(ranks, *work), nprocs=ranks)
            results[ranks] = [torch.load(folder / f"found-{ranks}-{rank}.pt") for rank in range(ranks)]
        alone |= {f"{source.name} -> {ONE.name}": resumed(source.name, ONE, world, folder) for source, _ in ONE_LOADS}
    finally:
        distributed.stop()
    return {1: [alone], **results}


def assert_same_rows(got: list[list[float]], want: list[list[float]]) -> None:
    """Loss to 1e-5; gradient norm, router losses and entropies to 1e-3; the load of every expert, to the token."""
    figures = 4 + MODEL.layers
    for step, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert mine[0] == pytest.approx(theirs[0], rel=1e-5), f"loss of row {step}"
        assert mine[1:figures] == pytest.approx(theirs[1:figures], rel=1e-3), f"figures of row {step}"
        assert mine[figures:] == theirs[figures:], f"loads of row {step}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_has_the_losses_of_one_process(found, layout):
    want = found[1][0][ONE.name]
    assert len(want) == STEPS
    assert want[-1][0] < want[0][0] - 0.5, "the run must learn, or equal losses would prove nothing"
    for result in found[layout.ranks]:
        assert_same_rows(result[layout.name], want)


@pytest.mark.parametrize(("source", "layout"), LOADS, ids=lambda layout: layout.name)
def test_checkpoints_go_on_in_any_layout(found, source, layout):
    """Weights, the state of both optimizers, and where the data stands."""
    for result in found[layout.ranks]:
        assert_same_rows(result[f"{source.name} -> {layout.name}"], found[1][0][ONE.name][SAVED_AT:])
