"""The grid of ranks: sizes that fit, sizes that are refused by name, and which ranks a group has."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from tiny_house import small

from grist_tools.plan_pretend import world_of
from grist_train.config import ComputeConfig
from grist_train.expert_parallel import check_layout
from grist_train.mesh import context_mesh, describe, expert_mesh, fsdp_part, grid_of, weight_mesh


@pytest.fixture
def first_of_16():
    with world_of(16):
        yield


@pytest.mark.usefixtures("first_of_16")
def test_neighbours_share_and_copies_are_far():
    grid = grid_of(ComputeConfig(replicate=2, expert_parallel=4, context_parallel=2), 16)
    ranks = dist.get_process_group_ranks
    weights, experts, context = (make("cpu", grid) for make in (weight_mesh, expert_mesh, context_mesh))
    assert ranks(weights.get_group("shard")) == list(range(8))
    assert ranks(weights.get_group("replicate")) == ranks(experts.get_group("replicate")) == [0, 8]
    assert ranks(experts.get_group("expert")) == [0, 1, 2, 3]
    assert ranks(experts.get_group("expert_data")) == [0, 4]
    assert ranks(context.get_group("context")) == [0, 1]
    assert fsdp_part(experts, "expert_data").mesh_dim_names == ("replicate", "expert_data")


@pytest.mark.usefixtures("first_of_16")
def test_without_copies_there_is_no_dimension_for_them():
    grid = grid_of(ComputeConfig(), 16)
    assert fsdp_part(weight_mesh("cpu", grid), "shard").mesh_dim_names == ("shard",)


@pytest.mark.parametrize(
    ("compute", "size", "message"),
    [
        (
            ComputeConfig(replicate=3),
            8,
            r"compute\.replicate 3 does not divide the 8 ranks of this run: use a divisor of 8",
        ),
        (ComputeConfig(context_parallel=3), 8, r"compute\.context_parallel 3 does not divide the 8 ranks of this run"),
        (
            ComputeConfig(replicate=4, expert_parallel=4),
            8,
            r"compute\.expert_parallel 4 does not divide the 2 ranks of each of 4 copies .*a multiple of 16 processes",
        ),
        (
            ComputeConfig(replicate=2, context_parallel=8),
            8,
            r"context_parallel 8 does not divide the 4 ranks of each of 2 copies",
        ),
    ],
)
def test_what_does_not_divide_is_named(compute, size, message):
    with pytest.raises(ValueError, match=message):
        check_layout(small(experts=8), compute, size)


def test_experts_are_cut_within_a_copy():
    """Two experts a rank, and width 16: over three groups nothing divides them, and copies do not count as groups."""
    check_layout(small(experts=4), ComputeConfig(replicate=3, expert_parallel=2), 6)
    with pytest.raises(ValueError, match="over 3 groups"):
        check_layout(small(experts=4), ComputeConfig(replicate=2, expert_parallel=2), 12)


def test_layouts_are_said_in_words():
    assert describe(small(experts=4), ComputeConfig()) == ""
    layout = ComputeConfig(replicate=2, expert_parallel=4, context_parallel=2)
    assert describe(small(experts=4), layout) == (
        ", 2 copies of the model, 1 of 4 experts on each, sequences shared by 2"
    )
