"""LoRA: the base model at first, W + scale * B A afterwards, and nothing trained but A and B."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_families import FAMILIES, adapted, randomize
from tiny_house import model, random_ids

import grist_model
from grist_model import Transformer, lora
from grist_model.lora_config import LoraConfig
from grist_model.lora_layers import LoraExperts, LoraLinear

IDS = random_ids(2, 12)


def attached(family: str, **settings) -> Transformer:
    made = model(**FAMILIES[family])
    lora.attach(made, lora.adapter_shape(made.config, LoraConfig(**settings)))
    lora.initialize_adapters(made, seed=0)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_fresh_adapters_computes_what_it_did(family):
    before, after = model(**FAMILIES[family])(IDS), attached(family, rank=3)(IDS)
    if FAMILIES[family].get("experts") == 0:
        assert torch.equal(after, before)
    else:  # the experts' products are summed in another order
        torch.testing.assert_close(after, before, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_compute_what_the_merged_model_does_gradients_included(family):
    """The merged weights' gradient dW gives that of A and B by the chain rule: dB = scale dW A^T, dA = scale B^T dW."""
    subject = adapted(family)
    shape, places = lora.shape_of(subject), lora.sites(subject.config)
    subject(IDS).square().mean().backward()
    plain = grist_model.build(subject.config)
    plain.load_state_dict(lora.merged(subject.state_dict(), subject.config, shape))
    plain(IDS).square().mean().backward()
    torch.testing.assert_close(subject(IDS), plain(IDS), rtol=1e-4, atol=1e-4)
    for name, pair in shape.items():
        site = places[name]
        a, b = (subject.get_parameter(each) for each in site.parameters)
        dw = plain.get_parameter(site.weight).grad
        assert dw is not None
        if site.experts is None:
            dw = dw[site.begin : site.end]
            want = pair.scale * b.T @ dw, pair.scale * dw @ a.T
        else:
            want = pair.scale * dw @ b.mT, pair.scale * a.mT @ dw
        for parameter, gradient in zip((a, b), want, strict=True):
            torch.testing.assert_close(
                parameter.grad, gradient, rtol=1e-3, atol=1e-5 * gradient.detach().abs().max().item()
            )


@pytest.mark.parametrize("family", ["gpt_oss", "gpt2"])
def test_only_the_pairs_are_trained(family):
    subject = adapted(family)
    subject(IDS).square().mean().backward()
    for name, parameter in subject.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == (".adapters." in name), name
    trained = {
        name.rsplit(".adapters.", 1)[0].split(".", 2)[2] for name, p in subject.named_parameters() if p.requires_grad
    }
    mlp = {"mlp.experts"} if family == "gpt_oss" else {"mlp.up", "mlp.down"}
    assert trained == {"attention.q", "attention.k", "attention.v", "attention.o"} | mlp


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_gives_a_plain_model_again(family):
    subject, base = adapted(family), model(**FAMILIES[family])
    want = subject(IDS)
    merged = grist_model.merge(subject)
    assert merged is subject
    assert not any(isinstance(module, (LoraLinear, LoraExperts)) for module in merged.modules())
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert all(parameter.requires_grad for parameter in merged.parameters())
    torch.testing.assert_close(merged(IDS), want, rtol=1e-4, atol=1e-4)
    assert (want - base(IDS)).abs().max() > 0.1, "adapters that change nothing would prove nothing"


def test_merging_a_state_dict_leaves_it_as_it_was():
    subject = adapted("llama")
    state = subject.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    lora.merged(state, subject.config, lora.shape_of(subject))
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_text_is_written_with_the_adapters():
    subject = adapted("llama")
    unmerged = grist_model.generate(subject, [1, 2, 3], max_new_tokens=12, temperature=0.0)
    base = grist_model.generate(model(**FAMILIES["llama"]), [1, 2, 3], max_new_tokens=12, temperature=0.0)
    assert unmerged == grist_model.generate(grist_model.merge(subject), [1, 2, 3], max_new_tokens=12, temperature=0.0)
    assert unmerged != base


def test_first_values_depend_on_seed_and_name_only():
    alone, among = attached("llama", rank=4, targets=("v",)), attached("llama", rank=4, targets=("all",))
    name = "blocks.1.attention.v.adapters.v"
    a = alone.get_parameter(f"{name}.a")
    assert torch.equal(a, among.get_parameter(f"{name}.a"))
    assert not torch.equal(a, among.get_parameter("blocks.0.attention.v.adapters.v.a"))
    wide = among.get_parameter("blocks.0.mlp.down.adapters.down.a")
    assert wide.std().item() == pytest.approx(1 / math.sqrt(3 * 32), rel=0.2)
    assert not any(p.any() for name, p in among.named_parameters() if name.endswith(".b"))


def test_scales():
    assert LoraConfig(rank=16, alpha=32).scale == 2
    assert LoraConfig(rank=16, alpha=32, rs=True).scale == 8


def test_half_of_a_fused_matrix_can_be_adapted():
    subject = attached("llama", rank=2, targets=("up",))
    weight = subject.get_parameter("blocks.0.mlp.gate_up.weight").clone()
    randomize(subject)
    grist_model.merge(subject)
    changed = (subject.get_parameter("blocks.0.mlp.gate_up.weight") != weight).any(1)
    assert changed.tolist() == [False] * 32 + [True] * 32


def test_the_base_is_seen_alone_for_a_while():
    subject = adapted("qwen3_moe")
    with lora.base_only(subject):
        assert subject.state_dict().keys() == model(**FAMILIES["qwen3_moe"]).state_dict().keys()
    assert lora.has_adapters(subject)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora.rank must be at least 1, but is 0"),
        ({"alpha": 0.0}, "lora.alpha must be greater than 0"),
        ({"targets": ("q", "router")}, "must name some of q, k, .*, but is router"),
        ({"targets": ()}, "but is empty"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


def test_what_a_model_does_not_have_is_refused():
    dense, moe = model(**FAMILIES["llama"]), model(**FAMILIES["gpt_oss"])
    with pytest.raises(ValueError, match=r"names w_down, which this model does not have: it has down, gate, k"):
        lora.adapter_shape(dense.config, LoraConfig(targets=("q", "w_down")))
    with pytest.raises(ValueError, match="names mlp"):
        lora.adapter_shape(moe.config, LoraConfig(targets=("mlp",)))
    with pytest.raises(ValueError, match=r"has no blocks\.7\.attention\.q to adapt"):
        lora.attach(dense, {"blocks.7.attention.q": lora.Pair(2, 1.0)})
    with pytest.raises(ValueError, match="has no adapters to merge"):
        grist_model.merge(dense)
    with pytest.raises(ValueError, match="has adapters already"):
        lora.attach(adapted("llama"), {"blocks.0.attention.q": lora.Pair(2, 1.0)})
