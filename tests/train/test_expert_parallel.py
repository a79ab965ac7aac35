"""Layouts of experts that do not fit are refused before anything starts, with what would fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_house import small
from tiny_run import write_run

from grist_train.__main__ import main
from grist_train.config import ComputeConfig, load, parse
from grist_train.expert_parallel import check_layout

RUNS = Path(__file__).resolve().parents[2] / "train" / "runs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compute.expert_parallel", "0"], "compute.expert_parallel must be at least 1, but is 0"),
        (["--compute.expert_parallel", "2", "--model.experts", "0"], "needs a mixture of experts"),
        (["--compute.expert_parallel", "3", "--model.experts", "4"], "does not divide model.experts 4"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(SystemExit, match=message):
        parse(arguments)


def layout(ranks: int, world_size: int, **model) -> None:
    check_layout(small(**model), ComputeConfig(expert_parallel=ranks), world_size)


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"compute\.expert_parallel 4 does not divide the 6 ranks of this run"):
        layout(4, 6)
    with pytest.raises(ValueError, match=r"leaves a rank 2 of 4 experts.* over 3 groups.* model.width 16"):
        layout(2, 6)


def test_ranks_that_fit_pass():
    layout(1, 7, width=16)  # without expert parallelism FSDP2 cuts unevenly
    layout(2, 4)  # a whole expert on each rank
    layout(2, 8)  # two experts a rank and four groups: rows of each
    layout(2, 6, experts=6)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_moe_1b_may_share_its_experts_on_eight_gpus(ranks):
    config = load(RUNS / "moe_1b.yaml", **{"compute.expert_parallel": ranks})
    check_layout(config.model, config.compute, 8)


@pytest.mark.parametrize(("run", "world_size"), [("gpt_oss_20b", 32), ("gpt_oss_20b", 64), ("gpt_oss_120b", 128)])
def test_published_shapes_share_their_experts_in_a_node(run, world_size):
    config = load(RUNS / f"{run}.yaml")
    assert config.compute.expert_parallel == 8
    check_layout(config.model, config.compute, world_size)


def test_one_process_cannot_share(tmp_path):
    config = load(write_run(tmp_path), **{"compute.expert_parallel": 2})
    with pytest.raises(SystemExit, match=r"^error: compute\.expert_parallel 2 does not divide the 1 ranks of this run"):
        main(config)
    assert not (tmp_path / "dataset").exists(), "refused before anything is prepared"
