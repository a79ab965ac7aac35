"""Norms of gradients by the part of the model they belong to."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_house import small

import grist_model
from grist_train.gradient_norms import GradientGroups, clip_by_group, gradient_groups


def with_gradients(**changes) -> torch.nn.Module:
    model = grist_model.build(small(**changes))
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw)
    return model


def by_hand(model: torch.nn.Module, chosen) -> float:
    gradients = [p.grad for name, p in model.named_parameters() if chosen(name) and p.grad is not None]
    return math.sqrt(sum(gradient.double().square().sum() for gradient in gradients))


def test_every_part_has_the_norm_of_its_own_gradients():
    model = with_gradients(shared_expert_width=8, qk_norm="head")
    groups = gradient_groups(model)
    norm, norms_G = clip_by_group(groups, 0.0)
    row = groups.row(norms_G.tolist())
    kinds = "embedding attention experts router mlp norms head".split()
    assert sorted(row) == sorted(f"grad_norm/{kind}" for kind in kinds)
    assert row["grad_norm/attention"] == pytest.approx(
        by_hand(model, lambda name: ".attention." in name and "norm" not in name), rel=1e-6
    )
    assert row["grad_norm/norms"] == pytest.approx(by_hand(model, lambda name: "norm" in name), rel=1e-6)
    assert row["grad_norm/mlp"] == pytest.approx(by_hand(model, lambda name: ".shared." in name), rel=1e-6)
    assert row["grad_norm/experts"] == pytest.approx(by_hand(model, lambda name: ".experts." in name), rel=1e-6)
    assert row["grad_norm/router"] == pytest.approx(by_hand(model, lambda name: ".router." in name), rel=1e-6)
    assert row["grad_norm/head"] == pytest.approx(by_hand(model, lambda name: name.startswith("head")), rel=1e-6)
    assert row["grad_norm/embedding"] == pytest.approx(by_hand(model, lambda name: name.startswith("emb")), rel=1e-6)
    assert norm.item() == pytest.approx(by_hand(model, lambda name: True), rel=1e-6)


def test_layers_told_apart_give_the_same_parts_and_a_norm_each():
    model = with_gradients()
    whole, layered = gradient_groups(model), gradient_groups(model, by_layer=True)
    row, with_layers = (groups.row(clip_by_group(groups, 0.0)[1].tolist()) for groups in (whole, layered))
    by_layer = with_layers.pop("grad_norm_by_layer")
    assert with_layers == pytest.approx(row, rel=1e-6)
    assert by_layer == pytest.approx(
        [by_hand(model, lambda name, i=i: name.startswith(f"blocks.{i}.")) for i in range(2)], rel=1e-6
    )


def test_every_trained_parameter_is_in_exactly_one_group():
    model = grist_model.build(small(positions="learned", yarn=None, tied_embeddings=True, experts=0))
    frozen = next(model.parameters())
    frozen.requires_grad = False
    grouped = [id(p) for group in gradient_groups(model, by_layer=True).parameters for p in group]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p is not frozen)


def test_what_is_not_finite_stays_in_its_group():
    model = with_gradients()
    gradient = model.get_parameter("blocks.1.mlp.router.weight").grad
    assert gradient is not None
    gradient[0, 0] = float("nan")
    groups = gradient_groups(model)
    norm, norms_G = clip_by_group(groups, 0.0)
    finite = [math.isfinite(norm) for norm in norms_G.tolist()]
    kinds = [kind for kind, _ in groups.labels]
    assert [kind for kind, ok in zip(kinds, finite, strict=True) if not ok] == ["router"]
    assert math.isnan(norm)


def test_a_group_without_a_gradient_has_norm_zero():
    p, q = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.full((3,), 2.0)
    groups = GradientGroups((("one", None), ("other", None)), ((p,), (q,)))
    assert clip_by_group(groups, 1.0)[1].tolist() == pytest.approx([math.sqrt(12), 0.0])
    assert p.grad.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_a_part_of_no_name_is_refused():
    with pytest.raises(ValueError, match=r"belongs to no known part of a model"):
        gradient_groups(torch.nn.ModuleDict({"something": torch.nn.Linear(2, 2)}))
