"""Where a run begins: the initial model's tokenizer for its data, and the adapters' own rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from tiny_house import config, portable

import grist_model
from grist_data.prepare import PrepareConfig
from grist_model import lora
from grist_model.lora_config import LoraConfig
from grist_train.config import ComputeConfig, OptimizerConfig, TrainConfig
from grist_train.data_config import DataConfig, SourceConfig
from grist_train.distributed import World
from grist_train.initial import add_adapters, check_base, fingerprint, with_initial_model
from grist_train.metrics import training_flops
from grist_train.optimizer import build

ALONE = World(
    0,
    1,
    0,
    torch.device("cpu"),
    cast("torch.distributed.ProcessGroup", None),
    cast("torch.distributed.ProcessGroup", None),
)
ADAMW = OptimizerConfig(name="adamw", lr=1e-3)
DATA = DataConfig(sequence_length=32)


def tuning(directory, **changes) -> TrainConfig:
    settings = {"initial": str(directory), "lora": LoraConfig(rank=2), "optimizer": ADAMW, "data": DATA}
    return TrainConfig(**settings | changes)


def test_the_tokenizer_of_the_initial_model_makes_the_data(tmp_path):
    directory = portable(tmp_path / "model")
    ours, theirs = PrepareConfig(tokenizer="initial"), PrepareConfig(tokenizer="bpe")
    one = with_initial_model(tuning(directory, data=replace(DATA, prepare=ours)), ALONE)
    assert one.data.prepare == replace(ours, tokenizer=str(directory))
    sources = {"a": SourceConfig("x", 1.0, ours), "b": SourceConfig("y", 1.0, theirs), "c": SourceConfig("z")}
    several = with_initial_model(tuning(directory, data=replace(DATA, sources=sources)), ALONE)
    found = [source.prepare and source.prepare.tokenizer for source in several.data.sources.values()]
    assert found == [str(directory), "bpe", None]
    with pytest.raises(ValueError, match=r"prepare\.tokenizer is initial, .* but the run has no initial"):
        with_initial_model(TrainConfig(data=replace(DATA, prepare=ours)), ALONE)


def test_frozen_weights_keep_the_type_that_they_are_stored_and_used_in(tmp_path):
    model = grist_model.build(config())
    grist_model.save(model, tmp_path / "half", dtype=torch.bfloat16)
    grist_model.save(model, tmp_path / "whole")
    for name, dtype, expected in (
        ("half", "bfloat16", torch.bfloat16),
        ("half", "float32", torch.float32),
        ("whole", "bfloat16", torch.float32),
    ):
        run = tuning(tmp_path / name, model=config(), compute=ComputeConfig(dtype=cast(Any, dtype)))
        shapes = grist_model.build(config(), device="meta")
        add_adapters(shapes, run, ALONE)
        for key, parameter in shapes.named_parameters():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else expected), key


def test_the_optimizer_has_the_adapters_and_nothing_else():
    model = grist_model.build(config(experts=0))
    lora.attach(model, lora.adapter_shape(model.config, LoraConfig(rank=2, targets=("q", "down"))))
    optimizers = build(model, replace(ADAMW, weight_decay=0.1))
    updated = [p for each in optimizers for group in each.param_groups for p in group["params"]]
    names = {name for name, p in model.named_parameters() if any(p is one for one in updated)}
    assert names == {
        f"blocks.{i}.{m}.adapters.{m[-1] if m[-1] == 'q' else 'down'}.{x}"
        for i in (0, 1)
        for m in ("attention.q", "mlp.down")
        for x in "ab"
    }
    assert all(group["weight_decay"] == 0.1 for each in optimizers for group in each.param_groups if group["params"])


def test_adapters_belong_to_the_weights_they_were_trained_beside(tmp_path):
    directory = portable(tmp_path / "model")
    run = tuning(directory)
    before = fingerprint(run)
    check_base(run, {"initial_xxh3": before})
    check_base(run, None)
    model = grist_model.load(directory)
    with torch.no_grad():
        model.norm.weight[-1] += 1e-3
    grist_model.save(model, directory)
    assert fingerprint(run) != before
    with pytest.raises(ValueError, match="hold adapters of other weights than"):
        check_base(run, {"initial_xxh3": before})
    assert fingerprint(replace(run, lora=None)) is None


def test_frozen_weights_save_a_third_of_their_products(tmp_path):
    model = config(experts=0, window_layers="none", window=None)
    run = tuning(tmp_path, model=model)
    whole, tuned = training_flops(replace(run, lora=None), 32), training_flops(run, 32)
    attention = 12 * 32 * 16.5 * model.layers  # 16.5 keys a query sees on average
    assert tuned == pytest.approx((whole - attention) * 2 / 3 + attention)
