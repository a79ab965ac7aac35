"""Which optimizer gets which parameter, and clipping."""

from __future__ import annotations

import pytest
import torch
from tiny_house import small

import grist_model
from grist_train import optimizer
from grist_train.config import OptimizerConfig
from grist_train.muon import Muon


@pytest.fixture
def model():
    return grist_model.build(small())


def names_of(model, parameters) -> set[str]:
    ids = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def test_every_parameter_has_exactly_one_role(model):
    by_role = optimizer.roles(model)
    everything = [*by_role.matrices, *by_role.embeddings, *by_role.decayed, *by_role.plain]
    assert len(everything) == len({id(p) for p in everything}) == len(list(model.parameters()))


def test_roles_are_what_their_names_say(model):
    by_role = optimizer.roles(model)
    matrices = names_of(model, by_role.matrices)
    assert {"blocks.0.attention.q.weight", "blocks.1.mlp.experts.w_down"} <= matrices
    assert not any("router" in name or "norm" in name or "b_" in name for name in matrices)
    assert names_of(model, by_role.embeddings) == {"embedding.weight"}
    assert "blocks.0.mlp.router.weight" in names_of(model, by_role.decayed)
    assert "blocks.0.mlp.experts.b_gate_up" in names_of(model, by_role.plain)


def test_muon_takes_the_matrices_and_adamw_the_rest(model):
    adamw, muon = optimizer.build(model, OptimizerConfig(name="muon"))
    assert isinstance(adamw, torch.optim.AdamW)
    assert isinstance(muon, Muon)
    taken = [p for o in (adamw, muon) for g in o.param_groups for p in g["params"]]
    assert len(taken) == len({id(p) for p in taken}) == len(list(model.parameters()))


def test_adamw_alone(model):
    (only,) = optimizer.build(model, OptimizerConfig(name="adamw", weight_decay=0.1))
    decays = {g["weight_decay"] for g in only.param_groups}
    assert decays == {0.0, 0.1}


def test_learning_rates_follow_the_multiplier(model):
    optimizers = optimizer.build(model, OptimizerConfig(lr=1e-2, muon_lr=1e-1, muon_warmup_steps=10))
    optimizer.set_learning_rate(optimizers, 0.5, step=5, config=OptimizerConfig(muon_warmup_steps=10))
    assert [g["lr"] for g in optimizers[0].param_groups] == pytest.approx([5e-3] * len(optimizers[0].param_groups))
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(5e-2)
    assert optimizers[1].param_groups[0]["momentum"] == pytest.approx(0.9)


def test_clipping_measures_then_scales():
    p, q = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4, 2))
    p.grad, q.grad = torch.full((3,), 2.0), torch.full((4, 2), 1.0)
    expected = (3 * 4.0 + 8 * 1.0) ** 0.5
    assert optimizer.clip_gradients([p, q], 0.0).item() == pytest.approx(expected)
    assert p.grad[0].item() == 2.0
    assert optimizer.clip_gradients([p, q], 1.0).item() == pytest.approx(expected)
    after = torch.cat([p.grad.flatten(), q.grad.flatten()]).norm().item()
    assert after == pytest.approx(1.0, rel=1e-4)


def test_small_gradients_are_left_alone():
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.full((3,), 1e-3)
    optimizer.clip_gradients([p], 1.0)
    torch.testing.assert_close(p.grad, torch.full((3,), 1e-3))


def test_clipping_without_gradients_is_an_error():
    with pytest.raises(ValueError, match="before any was computed"):
        optimizer.clip_gradients([torch.nn.Parameter(torch.zeros(2))], 1.0)
