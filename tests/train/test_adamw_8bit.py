"""AdamW with averages in 8 bits: what it shares with AdamW, and what it must not lose."""

from __future__ import annotations

import copy
import sys

import pytest
import tiny_house
import torch

from grist_train import optimizer
from grist_train.config import OptimizerConfig
from grist_train.step_guard import arm

CONFIG = OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.1, state_bits=8)


@pytest.fixture
def eager():
    """The step as it is written: compiling it takes seconds for every shape."""
    pytest.importorskip("torchao")
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def made(config: OptimizerConfig = CONFIG, **changes) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = tiny_house.model(**changes)
    (only,) = optimizer.build(model, config)
    return model, only


def steps(model: torch.nn.Module, only: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        draw = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.set_learning_rate([only], 1.0 / (1 + step), step, CONFIG)
        only.step()


def averages(only: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in only.state_dict()["state"].values() for value in state.values()]


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.delitem(sys.modules, "grist_train.adamw_8bit", raising=False)
    with pytest.raises(ImportError, match=r"state_bits 8 needs the package torchao: pip install"):
        made()


def test_it_learns_what_adamw_learns(eager):
    before = made()[0]
    narrow, wide = made(), made(OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.1))
    for each in (narrow, wide):
        steps(*each, 0, 6)
    for (name, start), got, want in zip(
        before.named_parameters(), narrow[0].parameters(), wide[0].parameters(), strict=True
    ):
        moved, expected = (got - start).flatten(), (want - start).flatten()
        assert torch.cosine_similarity(moved, expected, dim=0) > 0.99, name


def test_large_averages_take_a_quarter_of_the_memory(eager):
    from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

    model, only = made(expert_width=64)
    steps(model, only, 0, 1)
    narrow = {name for name, p in model.named_parameters() if isinstance(only.state[p]["exp_avg"], OptimState8bit)}
    assert {"embedding.weight", "blocks.0.mlp.experts.w_gate_up", "blocks.1.mlp.experts.w_down"} <= narrow
    assert not any("norm" in name for name in narrow)
    state = only.state[model.get_parameter("embedding.weight")]["exp_avg"]
    held = sum(part.numel() * part.element_size() for part in (state.codes, state.scale))
    assert held == pytest.approx(state.numel() * (1 + 4 / 256))


def test_a_skipped_step_changes_neither_weights_nor_averages(eager):
    model, only = made()
    steps(model, only, 0, 2)
    weights, before = copy.deepcopy(list(model.parameters())), copy.deepcopy(averages(only))
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    arm([only], torch.tensor(True))
    only.step()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), weights, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(averages(only), before, strict=True))
    arm([only], torch.tensor(False))
    steps(model, only, 2, 3)
    assert not torch.equal(next(iter(model.parameters())), weights[0])


def test_its_state_is_that_of_adamw_and_goes_on(eager):
    whole, first, second = made(), made(), made()
    steps(*whole, 0, 5)
    steps(*first, 0, 3)
    saved = first[1].state_dict()
    assert all(type(value) is torch.Tensor and value.dtype == torch.float32 for value in averages(first[1]))
    assert all(type(group["lr"]) is float for group in saved["param_groups"])
    at_3 = copy.deepcopy(first[0])
    second[0].load_state_dict(at_3.state_dict())
    second[1].load_state_dict(saved)
    steps(*second, 3, 5)
    for (name, want), got, before in zip(
        whole[0].named_parameters(), second[0].parameters(), at_3.parameters(), strict=True
    ):
        moved, expected = (got - before).flatten(), (want - before).flatten()
        assert torch.cosine_similarity(moved, expected, dim=0) > 0.999, name


def test_a_run_with_averages_in_32_bits_may_go_on_with_8(eager):
    wide = made(OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.1))
    steps(*wide, 0, 3)
    model, only = made()
    only.load_state_dict(wide[1].state_dict())
    for got, want in zip(averages(only), averages(wide[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.01 * want.abs().max().item())
    steps(model, only, 3, 4)
