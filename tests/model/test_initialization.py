from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from grist_model import ModelConfig, build, initialize


def test_values_depend_on_seed_and_name_only(tiny):
    one: Any = build(tiny())
    again: Any = build(tiny())
    deeper: Any = build(tiny(layers=5))
    initialize(again, seed=0)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name]), name
    assert torch.equal(one.blocks[1].attention.q.weight, deeper.blocks[1].attention.q.weight)
    assert not torch.equal(one.blocks[0].attention.q.weight, one.blocks[1].attention.q.weight)
    initialize(again, seed=1)
    assert not torch.equal(one.embedding.weight, again.embedding.weight)


def test_initialize_ignores_the_global_generator(tiny):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    build(tiny())
    assert torch.equal(torch.get_rng_state(), state)


def test_spread_of_the_values():
    config = ModelConfig(layers=8, width=128, vocab_size=700, expert_width=64, balance="bias", shared_expert_width=64)
    model: Any = build(config)
    residual = 0.02 / math.sqrt(16)
    block = model.blocks[3]
    for weight, std in [
        (model.embedding.weight, 0.02),
        (model.head.weight, 0.02),
        (block.attention.q.weight, 0.02),
        (block.attention.o.weight, residual),
        (block.mlp.experts.w_gate_up, 0.02),
        (block.mlp.experts.w_down, residual),
        (block.mlp.shared.down.weight, residual),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert abs(weight.mean().item()) < 0.05 * std
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((parameter == 1).all()), name
        elif parameter.dim() == 1 or ".b_" in name:
            assert bool((parameter == 0).all()), name
    assert bool((block.mlp.router.selection_bias == 0).all())


def test_blocks_and_experts_differ():
    model: Any = build(ModelConfig(vocab_size=1024))
    rows = model.embedding.weight
    assert not torch.equal(rows[:256], rows[256:512])
    experts = model.blocks[0].mlp.experts.w_down
    assert not torch.equal(experts[0], experts[1])


def test_type_of_numbers_does_not_change_the_draw(tiny):
    exact: Any = build(tiny())
    rounded: Any = build(tiny(), dtype=torch.bfloat16)
    assert torch.equal(rounded.head.weight, exact.head.weight.to(torch.bfloat16))


def test_wrapped_modules_keep_their_names(tiny):
    plain: Any = build(tiny())
    wrapped: Any = build(tiny())
    wrapped.blocks[0] = torch.compile(wrapped.blocks[0])  # adds "_orig_mod." to the names; compiles only when called
    initialize(wrapped, seed=0)
    expected = dict(plain.named_parameters())
    assert any("_orig_mod" in name for name, _ in wrapped.named_parameters())
    for name, parameter in wrapped.named_parameters():
        assert torch.equal(parameter, expected[name.replace("_orig_mod.", "")]), name


def test_meta_parameters_are_refused_and_materialised_ones_filled(tiny):
    model = build(tiny(), device="meta")
    with pytest.raises(ValueError, match=r"embedding\.weight is on the meta device"):
        initialize(model, seed=0)
    model.to_empty(device="cpu")
    initialize(model, seed=0)
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids), build(tiny())(ids))
