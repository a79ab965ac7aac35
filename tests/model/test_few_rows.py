"""What a CPU runs for a few tokens computes what the ops do, and sees weights that change."""

from __future__ import annotations

import pytest
import torch

import grist_kernels
from grist_kernels import backend
from grist_model import ModelConfig, build, few_rows, generate
from grist_model.attention import KVCache


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("width", [1, 7, 64, 2880])
def test_norm_is_that_of_float64(width):
    x, weight = 3 * torch.randn(2, 4, width), torch.randn(width)
    exact = grist_kernels.rms_norm(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(few_rows.rms_norm(x, weight, 1e-5).double(), exact, rtol=1e-5, atol=1e-6)
    assert few_rows.rms_norm(torch.zeros(1, width), weight, 1e-5).count_nonzero() == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_rotation_is_that_of_the_op(rows):
    q, k = torch.randn(rows, 2, 4, 6), torch.randn(rows, 2, 2, 6)
    angle = 10 * torch.rand(rows, 2, 3)
    expected = grist_kernels.rope(q, k, angle.cos(), angle.sin())
    got = few_rows.rope(q, k, *few_rows.whole_heads(angle.cos(), angle.sin()))
    for new, old in zip(got, expected, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6)


WIDE = ModelConfig(vocab_size=331, context_length=128, layers=3, width=256, experts=8, expert_width=128, window=9)
KINDS = {
    "gpt_oss": WIDE,
    "dense": ModelConfig(vocab_size=331, context_length=128, layers=2, width=256, experts=0, sinks=False, window=None),
    "qwen3_moe": ModelConfig(
        vocab_size=331, context_length=128, layers=2, width=256, experts=8, expert_width=128, sinks=False, qk_norm="head",
        attention_bias=False, mlp_bias=False, router_bias=False, swiglu_alpha=None, swiglu_limit=None,
    ),
    "gpt2": ModelConfig(
        vocab_size=331, context_length=128, layers=2, width=256, experts=0, activation="gelu", norm="layer", sinks=False,
        positions="learned", kv_heads=4, window=None, expert_width=512,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_a_wide_model_are_those_of_the_reference(no_gradients, kind):
    model = build(KINDS[kind])
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    ids = torch.randint(331, (2, 40), generator=torch.Generator().manual_seed(1))

    def steps(rollback: int | None) -> torch.Tensor:
        cache = KVCache(model.config, 2, 40, rollback=rollback)
        pieces = [model(piece, cache=cache, last=piece.shape[1]) for piece in ids.split([20, 1, 1, 4, *[1] * 14], 1)]
        return torch.cat(pieces, 1)

    got = steps(0)
    with backend.using("reference"):
        expected = steps(None)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (got != expected).any()  # the sums went another way
    prompt = ids[0, :20].tolist()
    text = generate(model, prompt, max_new_tokens=40, temperature=0)
    with backend.using("reference"):
        assert generate(model, prompt, max_new_tokens=40, temperature=0) == text


def test_weights_may_change_between_two_steps(no_gradients):
    model = build(KINDS["qwen3_moe"])
    ids = torch.arange(6)[None]
    before = model(ids, cache=KVCache(model.config, 1, 6))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(1.5)
    changed = model(ids, cache=KVCache(model.config, 1, 6))
    assert not torch.allclose(before, changed)
    torch.testing.assert_close(changed[:, 0], model.double()(ids)[:, -1].float(), rtol=1e-4, atol=1e-4)
