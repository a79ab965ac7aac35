"""How stacks of experts are cut: nothing is padded that need not be, and no rank holds more than padding would have it hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_house import small
from torch.distributed.tensor import Replicate, Shard

import grist_model
from grist_tools.plan_pretend import world_of
from grist_train.config import ComputeConfig
from grist_train.distributed import shard
from grist_train.expert_cut import dimension, held, ranks_of

GPT_OSS = {
    experts: [(experts, 2880, 5760), (experts, 2880, 2880), (experts, 5760), (experts, 2880)] for experts in (32, 128)
}


@pytest.mark.parametrize(
    ("shapes", "shards", "ranks", "dim"),
    [
        ([(8, 64, 128), (8, 64, 64)], 4, 4, 0),  # whole experts
        ([(8, 64, 128), (8, 64, 64)], 16, 16, 1),  # more ranks than experts: rows
        ([(6, 64, 128), (6, 64, 64)], 4, 4, 1),  # experts that ranks do not divide
        (GPT_OSS[32], 512, 64, 1),  # 2,880 rows are not divided by more than 64 of 512 ranks: eight copies
        (GPT_OSS[128], 512, 128, 0),  # one expert each, four copies
        (GPT_OSS[128], 64, 64, 0),
        ([(8, 33, 66)], 6, 6, 0),  # three ranks would hold more (no less than 11 rows of 8 experts): padded
    ],
)  # fmt: skip
def test_cuts(shapes, shards, ranks, dim):
    assert ranks_of(shapes, shards) == ranks
    assert {dimension(shape, ranks) for shape in shapes} == {dim}


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 96), st.integers(1, 4)),
    shards=st.integers(1, 96),
)
def test_no_rank_holds_or_receives_more_than_with_padding(shape, shards):
    ranks = ranks_of([shape], shards)
    padded = -(-shape[0] // shards) * math.prod(shape[1:])
    assert shards % ranks == 0
    assert math.prod(shape) <= ranks * held(shape, ranks) <= shards * padded
    assert held(shape, ranks) <= padded


def test_small_tensors_beside_large_ones_may_be_padded():
    """Adapters of rank 4 have too few rows for 16 ranks; the weights beside them do not."""
    assert ranks_of([(8, 64, 128), (8, 4, 128)], 16) == 16
    assert [dimension(shape, 16) for shape in ((8, 64, 128), (8, 4, 128))] == [1, 0]


@pytest.mark.parametrize(
    ("ranks", "compute", "placements"),
    [
        (4, ComputeConfig(), (Shard(1),)),
        (2, ComputeConfig(), (Shard(0),)),
        (4, ComputeConfig(replicate=2), (Replicate(), Shard(0))),
        (64, ComputeConfig(), (Replicate(), Shard(1))),  # 16 rows: four copies
        (64, ComputeConfig(replicate=2), (Replicate(), Shard(1))),
    ],
)
def test_what_fsdp_makes_of_it(ranks, compute, placements):
    """Six experts, 16 wide, of 16 and 32 columns."""
    with world_of(ranks) as world:
        model = grist_model.build(small(layers=1, experts=6, expert_width=16), device="meta")
        shard(model, world, compute)
        weights: dict[str, Any] = dict(model.named_parameters())
    assert weights["blocks.0.mlp.experts.w_down"].placements == placements
    assert weights["blocks.0.mlp.experts.w_down"].shape == (6, 16, 16)
    assert weights["blocks.0.mlp.router.weight"].device_mesh.size() == ranks
