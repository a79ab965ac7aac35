from __future__ import annotations

from typing import Any

import pytest
import torch

from grist_model import RouterStats
from grist_model.moe import MoE, Router


def filled(module: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def test_router_is_softmax_after_top_k(tiny):
    router = filled(Router(tiny()))
    x = torch.randn(2, 5, 32)
    ids, weights, stats = router(x)
    logits = (x @ router.weight.T + router.bias).flatten(0, 1).detach()
    for row in range(10):
        best = sorted(range(4), key=lambda e: -float(logits[row, e]))[:2]
        assert ids[row].tolist() == best
        torch.testing.assert_close(weights[row], logits[row, best].softmax(0))
    assert stats is None


def test_layer_is_the_weighted_sum_of_its_experts_plus_the_shared_one(tiny):
    config = tiny(shared_expert_width=12)
    layer = filled(MoE(config))
    x = torch.randn(2, 5, 32)
    out, _ = layer(x)

    def gated(h):
        gate, up = h.chunk(2, -1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    ids, weights, _ = layer.router(x)
    experts = layer.experts
    for row, x_D in enumerate(x.flatten(0, 1)):
        expected = layer.shared.down(gated(layer.shared.gate_up(x_D)))
        for e, weight in zip(ids[row].tolist(), weights[row], strict=True):
            h = gated(x_D @ experts.w_gate_up[e] + experts.b_gate_up[e])
            expected = expected + weight * (h @ experts.w_down[e] + experts.b_down[e])
        torch.testing.assert_close(out.flatten(0, 1)[row], expected)


def test_statistics_follow_their_definitions(tiny):
    config = tiny()
    router = filled(Router(config))
    x = torch.randn(3, 8, 32)
    ids, _, stats = router(x, return_stats=True)
    logits = x.double() @ router.weight.T.double() + router.bias.double()
    p = logits.detach().softmax(-1)
    aux = 0.0
    for b in range(3):
        chosen = ids.view(3, 8 * 2)[b]
        share = torch.bincount(chosen, minlength=4) / 16
        aux += 4 * float((share * p[b].mean(0)).sum()) * 8
    assert stats.tokens_per_expert_E.tolist() == torch.bincount(ids.flatten(), minlength=4).tolist()
    assert stats.tokens_per_expert_E.dtype == torch.int64
    assert stats.aux_loss_sum.item() == pytest.approx(aux, rel=1e-5)
    assert stats.z_loss_sum.item() == pytest.approx(logits.logsumexp(-1).square().sum().item(), rel=1e-5)
    assert float(stats.entropy_sum) == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)


def test_perfect_balance_costs_one_per_layer_and_token(make_model, ids):
    model = make_model()
    with torch.no_grad():
        for router in model.routers():
            router.weight.zero_()
            router.bias.zero_()
    _, stats = model.hidden(ids, return_router=True)
    # Equal logits: probabilities are uniform, so that whatever top-k picks, sum_e f_e P_e is 1 / E.
    assert stats.aux_loss_sum.item() == pytest.approx(model.config.layers * ids.numel(), rel=1e-5)
    assert stats.entropy_sum_L.tolist() == pytest.approx([ids.numel() * torch.tensor(4.0).log().item()] * 3, rel=1e-5)


def test_statistics_add_up_over_micro_batches(make_model, ids):
    model = make_model()
    _, whole = model.hidden(ids, return_router=True)
    parts = [model.hidden(row[None], return_router=True)[1] for row in ids]
    for name, total in whole._asdict().items():
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), total, msg=name)
    assert whole.tokens_per_expert_LE.sum(1).tolist() == [ids.numel() * 2] * 3


def test_gradients_of_the_balance_losses_reach_the_router(make_model, ids):
    model = make_model()
    _, stats = model.hidden(ids, return_router=True)
    for loss in (stats.aux_loss_sum, stats.z_loss_sum):
        grads = torch.autograd.grad(loss, [router.weight for router in model.routers()], retain_graph=True)
        assert all(float(grad.abs().max()) > 0 for grad in grads)
    assert not stats.entropy_sum_L.requires_grad


def test_dense_model_has_empty_statistics(make_model, ids):
    model = make_model(experts=0)
    _, stats = model.hidden(ids, return_router=True)
    assert isinstance(stats, RouterStats)
    assert stats.tokens_per_expert_LE.shape == (3, 0)
    assert stats.aux_loss_sum.item() == stats.z_loss_sum.item() == 0.0


def test_selection_bias_steers_the_choice_but_not_the_weights(tiny):
    router = filled(Router(tiny(balance="bias")))
    x = torch.randn(2, 6, 32)
    logits = (x @ router.weight.T + router.bias).flatten(0, 1).detach()
    router.selection_bias.copy_(torch.tensor([100.0, 0.0, 50.0, 0.0]))
    ids, weights, _ = router(x)
    assert ids.tolist() == [[0, 2]] * 12
    torch.testing.assert_close(weights, logits[:, [0, 2]].softmax(-1))


def test_update_of_the_selection_bias(make_model):
    model = make_model(balance="bias", bias_update_rate=0.01)
    counts = torch.tensor([[10, 0, 5, 5], [5, 5, 5, 5], [0, 0, 0, 20]])
    model.update_selection_bias(counts)
    biases = [router.selection_bias.tolist() for router in model.routers()]
    assert biases[0] == pytest.approx([-0.01, 0.01, 0.0, 0.0])
    assert biases[1] == pytest.approx([0.0] * 4)
    assert biases[2] == pytest.approx([0.005, 0.005, 0.005, -0.015])  # centred
    with pytest.raises(ValueError, match=r"tokens_per_expert_LE must be \(3, 4\), but is \(4,\)"):
        model.update_selection_bias(counts[0])
    with pytest.raises(ValueError, match="balance is 'aux'"):
        make_model().update_selection_bias(counts)


def test_updates_of_the_selection_bias_even_out_the_load(make_model, ids):
    model = make_model(balance="bias", bias_update_rate=0.02)

    def imbalance() -> float:
        counts = model.hidden(ids, return_router=True)[1].tokens_per_expert_LE.float()
        return float((counts / counts.mean(1, keepdim=True) - 1).abs().max())

    before = imbalance()
    with torch.no_grad():
        for _ in range(60):
            model.update_selection_bias(model.hidden(ids, return_router=True)[1].tokens_per_expert_LE)
    assert imbalance() < before / 3


def test_selection_bias_keeps_float32_when_the_model_is_cast(make_model):
    model = make_model(balance="bias")
    router = model.routers()[0]
    router.selection_bias.copy_(torch.tensor([0.001, 1.001, -0.25, 0.0]))
    model.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.selection_bias, torch.tensor([0.001, 1.001, -0.25, 0.0]))
    assert "blocks.0.mlp.router.selection_bias" in model.state_dict()
