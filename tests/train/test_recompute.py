"""Activation checkpointing: each kind keeps less than the one before it, and none changes a gradient."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_house import random_ids, small
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import grist_model
from grist_train import distributed
from grist_train.config import ComputeConfig, EveryBlocks


def step(experts: int, compute: ComputeConfig) -> tuple[torch.Tensor, int]:
    """All gradients of a loss, and the bytes that its forward keeps besides the weights."""
    shape = {"experts": experts, "active_experts": 2} if experts else {"experts": 0}
    model = grist_model.build(small(layers=4, width=32, context_length=64, **shape))
    distributed.prepare_blocks(model, compute)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_BTD = model.hidden(random_ids(2, 64, 64))
    hidden_BTD.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), sum(kept.values())


@pytest.mark.parametrize("experts", [0, 4])
def test_each_kind_keeps_less_and_computes_the_same(experts):
    kinds = ["none", EveryBlocks(2), EveryBlocks(1)]
    found = [step(experts, ComputeConfig(activation_checkpointing=kind)) for kind in kinds]
    (want, everything), (_, some), (_, least) = found
    assert least < some < everything
    assert some == pytest.approx((everything + least) / 2, rel=0.05), "two of four blocks"
    gradient, block = step(experts, ComputeConfig(activation_checkpointing="block"))
    assert block == least
    chosen, selective = step(experts, ComputeConfig(activation_checkpointing="selective"))
    assert least < selective < everything
    for other in (gradient, chosen, *(g for g, _ in found[1:])):
        assert torch.equal(other, want)


def test_selective_does_not_multiply_again():
    """Of a dense model: products with weights and attention run once, whether or not their halves are computed again."""

    # PyTorch does not count the CPU's attention; here one call is one.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    calls = {attention: lambda *shapes, **options: 1}

    def operations(kind) -> dict[str, int]:
        with FlopCounterMode(display=False, custom_mapping=calls) as counter:
            step(0, ComputeConfig(activation_checkpointing=kind))
        return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}

    plain, selective, block = (operations(kind) for kind in ("none", "selective", "block"))
    for names in ("aten.mm", "aten.addmm"), (str(attention),):
        once, kept, twice = (sum(run.get(name, 0) for name in names) for run in (plain, selective, block))
        assert 0 < once == kept < twice, names


@pytest.mark.parametrize("experts", [0, 4])
def test_selective_blocks_compile(experts, monkeypatch):
    """Not Inductor: its compiler takes a minute."""
    want, _ = step(experts, ComputeConfig())
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    got, _ = step(experts, ComputeConfig(activation_checkpointing="selective", compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before, "nothing was compiled"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
