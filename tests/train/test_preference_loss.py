from __future__ import annotations

import math

import numpy as np
import pytest
import tiny_house
import torch
import torch.nn.functional as F

from grist_data.preferences import PreferencePair
from grist_train.loss import step_values
from grist_train.preference_batches import pair_batch
from grist_train.preference_config import PreferenceConfig
from grist_train.preference_loss import FIGURES, answer_log_probabilities, preference_loss


def random_pairs(n: int, seed: int = 0) -> list[PreferencePair]:
    draw = np.random.default_rng(seed)

    def sequence(prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        answer = draw.integers(0, 320, draw.integers(1, 9))
        return np.concatenate([prompt, answer]), np.arange(len(prompt) + len(answer)) >= len(prompt)

    out = []
    for _ in range(n):
        prompt = draw.integers(0, 320, draw.integers(1, 12))
        out.append(PreferencePair(*sequence(prompt), *sequence(prompt)))
    return out


def naive_log_p(model, ids: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """One sequence, alone, from its logits."""
    tokens = torch.from_numpy(ids)[None]
    log_p_TV = F.log_softmax(model(tokens[:, :-1])[0].float(), -1)
    said_T = log_p_TV.gather(1, tokens[0, 1:, None])[:, 0]
    return said_T[torch.from_numpy(mask[1:])].sum()


def naive_loss(model, pairs, reference_P2, settings: PreferenceConfig) -> torch.Tensor:
    total = torch.zeros(())
    for pair, (chosen_reference, rejected_reference) in zip(pairs, reference_P2.tolist(), strict=True):
        chosen = naive_log_p(model, pair.chosen_ids, pair.chosen_mask)
        rejected = naive_log_p(model, pair.rejected_ids, pair.rejected_mask)
        m = settings.beta * ((chosen - chosen_reference) - (rejected - rejected_reference))
        right, wrong = torch.sigmoid(m), torch.sigmoid(-m)
        total = total - (1 - settings.label_smoothing) * right.log() - settings.label_smoothing * wrong.log()
        total = total - settings.sft_weight * chosen / pair.chosen_mask.sum()
    return total / len(pairs)


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("options", [{}, {"beta": 0.7, "label_smoothing": 0.2, "sft_weight": 0.3}])
def test_loss_and_gradients_are_those_of_the_formula(experts, options):
    model = tiny_house.model(experts=experts, aux_loss_weight=0.0, router_z_loss_weight=0.0).train()
    pairs, settings = random_pairs(5), PreferenceConfig(("x",), **options)
    reference_P2 = np.random.default_rng(1).normal(-20, 3, (5, 2))
    want = naive_loss(model, pairs, reference_P2, settings)
    want.backward()
    want_grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = torch.zeros(())
    for part in (slice(0, 2), slice(2, 5)):  # micro-batches add up
        batch = pair_batch(pairs[part], reference_P2[part], "cpu")
        result = preference_loss(model, model.config, batch, settings, 5, 2 * batch.ids_BT.numel())
        result.objective.backward()
        found += result.objective.detach()
    assert float(found) == pytest.approx(float(want.detach()), rel=1e-5)
    for name, p in model.named_parameters():
        scale = float(want_grads[name].abs().max()) + 1e-6
        assert p.grad is not None, name
        assert float((p.grad - want_grads[name]).abs().max()) < 1e-4 * scale, name


def test_log_probabilities_are_those_of_every_sequence_alone():
    model, pairs = tiny_house.model(), random_pairs(4)
    with torch.no_grad():
        log_p_S, _ = answer_log_probabilities(model, model.config, pair_batch(pairs, None, "cpu"))
        want = [
            naive_log_p(model, ids, mask)
            for pair in pairs
            for ids, mask in ((pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask))
        ]
    torch.testing.assert_close(log_p_S, torch.stack(want), rtol=1e-5, atol=1e-4)


def test_a_model_that_is_its_own_reference_has_the_loss_of_a_coin():
    model, pairs, settings = tiny_house.model(), random_pairs(3), PreferenceConfig(("x",))
    with torch.no_grad():
        log_p_S, _ = answer_log_probabilities(model, model.config, pair_batch(pairs, None, "cpu"))
        batch = pair_batch(pairs, log_p_S.double().view(-1, 2).numpy(), "cpu")
        result = preference_loss(model, model.config, batch, settings, 3, batch.ids_BT.numel())
    assert float(result.sums[0]) / 3 == math.log(2) or float(result.sums[0]) / 3 == pytest.approx(math.log(2), abs=1e-7)
    assert result.figures is not None
    assert result.figures.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("experts", [0, 4])
def test_figures_stand_after_the_gradient_norm(experts):
    model, pairs, settings = tiny_house.model(experts=experts), random_pairs(4), PreferenceConfig(("x",), beta=1.0)
    reference_P2 = np.zeros((4, 2))
    results = []
    with torch.no_grad():
        for part in (slice(0, 1), slice(1, 4)):
            batch = pair_batch(pairs[part], reference_P2[part], "cpu")
            results.append(preference_loss(model, model.config, batch, settings, 4, batch.ids_BT.numel()))
    log_p = [
        float(naive_log_p(model, ids, mask))
        for pair in pairs
        for ids, mask in ((pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask))
    ]
    chosen, rejected = np.array(log_p[::2]), np.array(log_p[1::2])
    values = step_values(results, torch.tensor(7.0), 4, 256, model.config, lambda x: x).tolist()
    assert values[1] == 7.0
    found = dict(zip(FIGURES, values[2:6], strict=True))
    assert found["preference_accuracy"] == (chosen > rejected).mean()
    assert found["reward_margin"] == pytest.approx((chosen - rejected).mean(), rel=1e-4)
    assert found["reward_chosen"] == pytest.approx(chosen.mean(), rel=1e-4)
    assert found["reward_rejected"] == pytest.approx(rejected.mean(), rel=1e-4)
    layers = model.config.layers
    assert len(values) == (6 if experts == 0 else 8 + layers + layers * experts)
    if experts:
        assert sum(values[-layers * experts :]) > 0
