"""The gradient of a step does not depend on how the step is cut into micro-batches."""

from __future__ import annotations

import pytest
import torch
from tiny_house import small

import grist_model
from grist_data import Batch
from grist_model.config import ModelConfig
from grist_train.loss import language_model_loss, step_values

CONFIG = small(aux_loss_weight=0.1, router_z_loss_weight=0.1)
ROWS, T = 6, 16


def batches(size: int, ignored: int = 5) -> list[Batch]:
    """The same 6 sequences in micro-batches of `size`; the first row ignores some targets."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 64, (ROWS, T + 1), generator=draw)
    ids, targets = rows[:, :-1], rows[:, 1:].clone()
    targets[0, :ignored] = -100
    return [
        Batch(ids[i : i + size], targets[i : i + size], None, int((targets[i : i + size] >= 0).sum()))
        for i in range(0, ROWS, size)
    ]


def run(size: int, config: ModelConfig = CONFIG):
    model = grist_model.build(config)
    parts = batches(size)
    valid = sum(b.n_valid_tokens for b in parts)
    results = []
    for batch in parts:
        result = language_model_loss(model, config, batch, valid, ROWS * T)
        result.objective.backward()
        results.append(result)
    values = step_values(results, torch.tensor(1.0), valid, ROWS * T, config, lambda x: x)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, values


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_and_figures_do_not_depend_on_micro_batches(size):
    want, want_values = run(ROWS)
    got, got_values = run(size)
    torch.testing.assert_close(got_values, want_values, rtol=1e-5, atol=1e-6)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_values_are_what_they_are_called():
    _, values = run(ROWS)
    layers, experts = CONFIG.layers, CONFIG.experts
    assert values.shape == (4 + layers + layers * experts,)
    loss, grad_norm, aux, z = values[:4].tolist()
    assert loss == pytest.approx(torch.log(torch.tensor(64.0)).item(), abs=0.2)  # untrained: uniform over 64 ids
    assert grad_norm == 1.0
    assert 1.0 <= aux < 4.0
    assert z > 0
    assert all(0 < e <= torch.log(torch.tensor(4.0)).item() + 1e-5 for e in values[4 : 4 + layers].tolist())
    counts = values[4 + layers :].view(layers, experts)
    assert counts.sum(1).tolist() == [ROWS * T * CONFIG.active_experts] * layers


def test_dense_model_has_two_values():
    import dataclasses

    _, values = run(ROWS, dataclasses.replace(CONFIG, experts=0))
    assert values.shape == (2,)


def test_router_losses_reach_the_router():
    import dataclasses

    without = dataclasses.replace(CONFIG, aux_loss_weight=0.0, router_z_loss_weight=0.0)
    with_losses, _ = run(ROWS)
    plain, _ = run(ROWS, without)
    name = "blocks.0.mlp.router.weight"
    assert (with_losses[name] - plain[name]).abs().max() > 1e-5


def test_a_softcap_is_part_of_the_loss():
    config = small(experts=0, initializer_range=0.3, logit_softcap=1.5)
    model = grist_model.build(config)
    (batch,) = batches(ROWS)
    result = language_model_loss(model, config, batch, batch.n_valid_tokens, ROWS * T)
    want = torch.nn.functional.cross_entropy(model(batch.ids_BT).flatten(0, 1), batch.targets_BT.flatten())
    torch.testing.assert_close(result.objective, want)
    plain = small(experts=0, initializer_range=0.3)
    other = language_model_loss(grist_model.build(plain), plain, batch, batch.n_valid_tokens, ROWS * T)
    assert abs(float((other.objective - result.objective).detach())) > 1e-2
