"""Layouts: what the trainer can run is asked of the trainer, and nothing else is ever tried."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from grist_tools.plan_layout import CHECKPOINTING, SETTINGS, Layout, can_run, layout_of, layouts, micro_batch
from grist_train.config import TrainConfig, load, parse

RUNS = Path(__file__).parents[2] / "train" / "runs"


def run(name: str = "moe_1b", **overrides) -> TrainConfig:
    return load(RUNS / f"{name}.yaml", **overrides)


def test_dealing_out_the_batch():
    config = replace(run(), batch=replace(run().batch, global_size=64, micro_size=4))
    assert micro_batch(config, 8) == (4, 2)
    assert micro_batch(config, 32) == (2, 1)
    with pytest.raises(ValueError, match="64 cannot be dealt out to 7 GPUs"):
        micro_batch(config, 7)
    with pytest.raises(ValueError, match="not filled by micro-batches of 4"):
        micro_batch(replace(config, batch=replace(config.batch, global_size=48)), 8)


def test_a_run_file_says_its_layout():
    layout = layout_of(run("gpt_oss_20b"), 32, 8)
    assert (layout.expert_parallel, layout.activation_checkpointing, layout.micro_size) == (8, "block", 2)
    assert layout.micro_batches == 16
    assert layout.options(run("gpt_oss_20b")) == ""
    with pytest.raises(ValueError, match="does not divide the 4 ranks"):
        layout_of(run("gpt_oss_20b"), 4, 8)


def test_options_are_what_the_trainer_takes():
    config = run("gpt_oss_20b")
    other = replace(layout_of(config, 8, 8), expert_parallel=4, activation_checkpointing="none", micro_size=4)
    taken = run("gpt_oss_20b", **dict(option.split(" ") for option in other.options(config)[2:].split(" --")))
    assert taken == other.config(config)


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_every_kind_of_checkpointing_can_be_written(kind):
    config = run("moe_1b")
    other = replace(layout_of(config, 8, 8), activation_checkpointing=kind)
    options = other.options(config).split(" ")
    taken = parse(["--config", str(RUNS / "moe_1b.yaml"), *([] if options == [""] else options)])
    assert taken == other.config(config)


def test_what_the_trainer_does_not_have_is_refused(monkeypatch):
    monkeypatch.setitem(SETTINGS, "replicate", "a_setting_to_come")
    layout = replace(layout_of(run(), 16, 8), replicate=2)
    with pytest.raises(ValueError, match=r"the trainer has no setting compute\.a_setting_to_come"):
        layout.config(run())
    assert not can_run(run(), layout)
    assert {each.replicate for each in layouts(run(), layout_of(run(), 16, 8))} == {1}


def test_gpus_that_share_a_sequence_read_the_same():
    config = run("moe_1b", **{"compute.context_parallel": 2, "model.balance": "bias"})
    assert micro_batch(config, 16) == micro_batch(run(), 8)


def test_only_layouts_that_the_trainer_takes_are_tried():
    config = run("gpt_oss_20b")
    own = layout_of(config, 64, 8)
    tried = layouts(config, own)
    assert own in tried
    assert len(tried) == len(set(tried)) > 50
    assert {layout.expert_parallel for layout in tried} == {1, 2, 4, 8}
    for layout in tried:
        readers = layout.gpus // layout.context_parallel
        assert layout.micro_size * layout.micro_batches * readers == config.batch.global_size
        assert micro_batch(layout.config(config), 64) == (layout.micro_size, layout.micro_batches)
    assert {layout.activation_checkpointing for layout in tried} == set(CHECKPOINTING)
    assert {layout.micro_size for layout in tried if layout.context_parallel > 1} == {1}
    assert {layout.context_parallel for layout in tried} == {1, 2, 4, 8}


def test_sequences_that_cannot_be_shared_are_not():
    config = run("moe_1b", **{"data.document_masks": True, "data.packing": "best-fit"})
    assert {layout.context_parallel for layout in layouts(config, layout_of(config, 8, 8))} == {1}


def test_a_dense_model_has_no_experts_to_share():
    config = run("moe_1b", **{"model.experts": 0})
    assert {layout.expert_parallel for layout in layouts(config, layout_of(config, 8, 8))} == {1}


def test_copies_divide_the_ranks_that_parameters_are_cut_over():
    assert Layout(64, 8, 1, 1).shards == 64
    assert Layout(64, 8, 1, 1, replicate=8).shards == 8
