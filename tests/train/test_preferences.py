from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_house
import torch

from grist_data import Tokenizer
from grist_train import distributed
from grist_train.config import BatchConfig, TrainConfig
from grist_train.preference_batches import pair_batch
from grist_train.preference_config import PreferenceConfig
from grist_train.preference_loss import FIGURES, preference_loss
from grist_train.preferences import measured, open_pair_batches, read_pairs, validate_pairs


@pytest.fixture(scope="module")
def world():
    yield distributed.start("cpu", threads=1)
    distributed.stop()


@pytest.fixture
def house(tmp_path):
    """A configuration with 9 short pairs and a long one, its model and its tokenizer."""
    rows = [{"prompt": f"{i} sacks of", "chosen": " flour" * (1 + i % 3), "rejected": " sand"} for i in range(9)]
    rows.append({"prompt": "How", "chosen": " long" * 200, "rejected": " short"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_house.model(context_length=64)
    config = TrainConfig(
        out=str(tmp_path),
        initial="a directory",
        model=model.config,
        preferences=PreferenceConfig((str(tmp_path / "pairs.jsonl"),), raw_text=True, val_fraction=0.3),
        batch=BatchConfig(4, 2),
    )
    return config, model, tiny_house.tokenizer()


def test_long_pairs_are_left_out_aloud(house, world, capsys):
    config, _, tokenizer = house
    assert len(read_pairs(config, tokenizer, world)) == 9
    assert "1 of 10 pairs are longer than 64 tokens and left out" in capsys.readouterr().err


def test_no_pair_that_fits_is_an_error(house, world):
    config, _, tokenizer = house
    short = _with(config, max_tokens=3)
    with pytest.raises(ValueError, match=r"none of the 10 pairs .* fits into 3 tokens"):
        read_pairs(short, tokenizer, world)


def test_held_out_figures_are_means_over_all_held_out_pairs(house, world):
    config, model, tokenizer = house
    pairs = read_pairs(config, tokenizer, world)
    found = measured(pairs, config, model, world, resuming=False)
    assert sorted(found.train + found.held_out) == list(range(9))
    for p in model.parameters():
        p.data.mul_(1.05)
    model.train()
    result = validate_pairs(model, found, config, world)
    assert model.training, "as it was"
    assert config.preferences is not None
    with torch.no_grad():
        batch = pair_batch([pairs[i] for i in found.held_out], found.reference_P2[found.held_out], "cpu")
        n = len(found.held_out)
        whole = preference_loss(model.eval(), model.config, batch, config.preferences, n, batch.ids_BT.numel())
    assert result["pairs"] == n
    assert result["loss"] == pytest.approx(float(whole.sums[0]) / n, rel=1e-5)
    assert whole.figures is not None
    for name, value in zip(FIGURES, (whole.figures / n).tolist(), strict=True):
        assert result[name] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_the_reference_outlives_the_model(house, world):
    config, model, tokenizer = house
    pairs = read_pairs(config, tokenizer, world)
    first = measured(pairs, config, model, world, resuming=False)
    for p in model.parameters():
        p.data.zero_()
    again = measured(pairs, config, model, world, resuming=True)
    np.testing.assert_array_equal(again.reference_P2, first.reference_P2)
    (batch, _) = next(open_pair_batches(again, config, world, None))
    assert batch.n_valid_tokens == 2


def test_a_run_goes_on_only_with_its_reference_and_its_pairs(house, world):
    config, model, tokenizer = house
    pairs = read_pairs(config, tokenizer, world)
    with pytest.raises(ValueError, match=r"reference\.npz is not there"):
        measured(pairs, config, model, world, resuming=True)
    measured(pairs, config, model, world, resuming=False)
    with pytest.raises(ValueError, match="began with other pairs"):
        measured(pairs[1:], config, model, world, resuming=True)


def test_texts_without_a_template_need_one_or_raw_text(house, world):
    config, _, tokenizer = house
    assert isinstance(tokenizer, Tokenizer)
    with pytest.raises(ValueError, match="chat template"):
        read_pairs(_with(config, raw_text=False), tokenizer, world)


def _with(config: TrainConfig, **changes) -> TrainConfig:
    assert config.preferences is not None
    return replace(config, preferences=replace(config.preferences, **changes))
