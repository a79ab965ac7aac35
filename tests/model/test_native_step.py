"""Layers that the native kernels take whole: the same text, and none that has something of its own to do."""

from __future__ import annotations

import pytest
import torch
from generation_steps import KINDS, check_changed_weights, check_steps, wide_model
from native_setting import natively  # noqa: F401

from grist_kernels import native
from grist_kernels.native import step
from grist_model.attention import KVCache

pytestmark = pytest.mark.usefixtures("natively")


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """Names of the halves of layers that were taken whole."""
    seen: list[str] = []
    for name in ("attention_step", "mlp"):
        whole = getattr(step, name)
        monkeypatch.setattr(step, name, lambda *given, n=name, f=whole: (seen.append(n), f(*given))[1])
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_a_wide_model_are_those_of_the_reference(taken, kind):
    check_steps(kind)
    assert "attention_step" in taken
    assert ("mlp" in taken) == (kind == "dense")


def test_weights_may_change_between_two_steps(taken):
    check_changed_weights()
    assert taken


def one_step(model, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
    cache = cache or KVCache(model.config, ids.shape[0], ids.shape[1])
    model(ids[:, :-1], cache=cache)
    return model(ids[:, -1:], cache=cache)[:, 0]


@pytest.mark.parametrize("kind", ["gpt_oss", "dense", "qwen3_moe"])
def test_bfloat16_is_closer_than_pytorch(taken, kind):
    model, ids = wide_model(kind).bfloat16(), torch.arange(24).view(2, 12)
    got = one_step(model, ids)
    assert taken
    with native.using("0"):
        usual = one_step(model, ids)
    exact = model.double()(ids)[:, -1]
    assert got.dtype == torch.bfloat16
    assert float((got.double() - exact).abs().max()) <= 1.5 * float((usual.double() - exact).abs().max())


def test_prompts_of_unequal_length(taken):
    model, prompt = wide_model("gpt_oss"), torch.arange(20).view(2, 10)

    def text() -> torch.Tensor:
        cache = KVCache(model.config, 2, 30, rollback=0)  # 9 slots of a window move to the front on the way
        steps = [model(prompt, cache=cache, lengths_B=torch.tensor([10, 4]))]
        return torch.cat(steps + [model(prompt[:, :1] + i, cache=cache) for i in range(20)], 1)

    got = text()
    assert taken
    with native.using("0"):
        expected = text()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_listener_hears_its_layer(taken):
    model, heard = wide_model("dense"), []
    for block in range(len(model.blocks)):
        model.get_submodule(f"blocks.{block}.attention.k").register_forward_hook(lambda *_: heard.append("k"))
        model.get_submodule(f"blocks.{block}.mlp.down").register_forward_pre_hook(lambda *_: heard.append("down"))
    one_step(model, torch.arange(4)[None])
    assert heard.count("k") == heard.count("down") == 2 * len(model.blocks)
    assert taken == []


def test_other_layers_and_caches_keep_their_turn(taken):
    class Linear(torch.nn.Linear):
        pass

    class OtherCache(KVCache):
        def attend(self, *given):
            return super().attend(*given)

    model = wide_model("dense")
    one_step(model, torch.arange(4)[None], OtherCache(model.config, 1, 4))
    assert set(taken) == {"mlp"}
    taken.clear()
    for block in range(len(model.blocks)):
        for name in ("attention.o", "mlp.gate_up"):
            model.get_submodule(f"blocks.{block}.{name}").__class__ = Linear
    one_step(model, torch.arange(4)[None])
    assert taken == []


def test_many_rows_go_elsewhere(taken):
    model = wide_model("dense")
    cache = KVCache(model.config, 1, 30)
    for count in (3, 9, 8):
        taken.clear()
        model(torch.arange(count)[None], cache=cache)
        assert ("attention_step" in taken) == (count == 8)  # the first is a prompt
        assert ("mlp" in taken) == (count <= 8)
