"""What a rank keeps of a batch that it shares, and what cannot be shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_house import random_ids, small

import grist_model
from grist_data import Batch
from grist_train.config import parse
from grist_train.context_parallel import own_share, sharing_sequences
from grist_train.distributed import World

GROUP: Any = object()


def world(rank: int, context: int) -> World:
    return World(rank, 8, rank, torch.device("cpu"), GROUP, GROUP, context, GROUP if context > 1 else None)


def test_shares_are_the_batch_and_its_targets_are_counted_once():
    ids = random_ids(2, 16)
    batch = Batch(ids, ids + 1, None, 29)
    shares = [own_share(batch, world(rank, 4)) for rank in (4, 5, 6, 7)]
    assert shares[1].ids_BT.tolist() == torch.cat((ids[:, 2:4], ids[:, 12:14]), 1).tolist()
    assert sorted(torch.cat([share.ids_BT for share in shares], 1).flatten().tolist()) == sorted(ids.flatten().tolist())
    assert all(torch.equal(share.targets_BT, share.ids_BT + 1) for share in shares)
    assert sum(share.n_valid_tokens for share in shares) == 29
    assert own_share(batch, world(3, 1)) is batch


def test_ranks_of_a_group_read_the_same_samples():
    worlds = [world(rank, 2) for rank in range(8)]
    assert [each.data_rank for each in worlds] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {each.data_size for each in worlds} == {4}


def test_document_borders_are_refused():
    ids = random_ids(1, 16)
    packed = Batch(ids, ids, torch.tensor([0, 3, 16], dtype=torch.int32), 16)
    with pytest.raises(ValueError, match=r"set data\.document_masks to false"):
        own_share(packed, world(0, 2))
    model = grist_model.build(small())
    with sharing_sequences(model, world(0, 2)), pytest.raises(ValueError, match="cannot be packed documents"):
        model.hidden(ids, cu_seqlens=packed.cu_seqlens)
    assert model.context_group is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.sequence_length", "36"], "8 pieces, which do not divide data.sequence_length 36: make it a multiple of 8"),
        (["--data.document_masks", "true"], "set data.document_masks to false"),
        (["--data.packing", "best-fit"], "data.packing to none"),
        (
            ["--model.rope_scaling.kind", "dynamic", "--model.rope_scaling.factor", "2", "--model.yarn", "null"],
            "does not fit model.rope_scaling.kind dynamic",
        ),
    ],
)  # fmt: skip
def test_runs_that_cannot_share_sequences_are_refused(arguments, message, capsys):
    shape = ["--model.context_length", "64", "--data.sequence_length", "32"]
    with pytest.raises(SystemExit) as error:
        parse([*shape, "--compute.context_parallel", "4", *arguments])
    assert message in f"{error.value} {capsys.readouterr().err}"
