"""Copies, cuts and shares of a model compute what one process computes, and go on from each other's checkpoints."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from layout_matrix import MODEL, SAVED_AT, SIX_EXPERTS, STEPS, TWO_EXPERTS, Layout, resumed, start_rank, whole_run
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
# Of other models, whose experts are cut otherwise on four ranks than on two.
ONE_OF_SIX, ONE_OF_TWO = Layout("six experts", 1, model=SIX_EXPERTS), Layout("two experts", 1, model=TWO_EXPERTS)
ONES = {each.model: each for each in (ONE, ONE_OF_SIX, ONE_OF_TWO)}
FOUR_OTHERS = [
    Layout("4: six experts in rows", 4, model=SIX_EXPERTS),
    Layout("4: two copies, three experts each", 4, ComputeConfig(replicate=2), SIX_EXPERTS),
    Layout("4: two copies of two experts", 4, ComputeConfig(activation_checkpointing="block"), TWO_EXPERTS),
]
ROWS, WHOLE, COPIES = FOUR_OTHERS
TWO_OTHERS = [Layout("2: three experts each", 2, model=SIX_EXPERTS)]
LAYOUTS = [*FOUR, *FOUR_OTHERS, *TWO, *TWO_OTHERS]
# Each goes on from the checkpoint of its neighbour in the list: one process writes for the first, and reads that of the last.
FOUR_LOADS = [*zip([ONE, *FOUR], FOUR, strict=False), (WHOLE, ROWS), (ONE_OF_SIX, WHOLE), (ONE_OF_TWO, COPIES)]
TWO_LOADS = [*zip([FOUR[-1], *TWO], TWO, strict=False), (FOUR[1], TWO[0]), (ROWS, *TWO_OTHERS)]
ONE_LOADS = [(TWO[-1], ONE), (FOUR[-1], ONE), (ROWS, ONE_OF_SIX), (COPIES, ONE_OF_TWO)]
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
        alone = {one.name: whole_run(one, world, folder) for one in ONES.values()}
        results = {}
        for ranks, layouts, loads in ((4, [*FOUR, *FOUR_OTHERS], FOUR_LOADS), (2, [*TWO, *TWO_OTHERS], TWO_LOADS)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MASTER_ADDR", "127.0.0.1")
                patch.setenv("MASTER_PORT", str(free_port()))
                patch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
                work = layouts, [(source.name, layout) for source, layout in loads], folder
                spawn(start_rank, args=(ranks, *work), nprocs=ranks)
            results[ranks] = [torch.load(folder / f"found-{ranks}-{rank}.pt") for rank in range(ranks)]
        alone |= {f"{source.name} -> {one.name}": resumed(source.name, one, world, folder) for source, one in ONE_LOADS}
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
    want = found[1][0][ONES[layout.model].name]
    assert len(want) == STEPS
    assert want[-1][0] < want[0][0] - 0.5, "the run must learn, or equal losses would prove nothing"
    for result in found[layout.ranks]:
        assert_same_rows(result[layout.name], want)


@pytest.mark.parametrize(("source", "layout"), LOADS, ids=lambda layout: layout.name)
def test_checkpoints_go_on_in_any_layout(found, source, layout):
    """Weights, the state of both optimizers, and where the data stands."""
    for result in found[layout.ranks]:
        assert_same_rows(result[f"{source.name} -> {layout.name}"], found[1][0][ONES[layout.model].name][SAVED_AT:])
